"""A process of this Python that another one asks: it gets JSON, a line each, and answers in lines of JSON."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from types import TracebackType
from typing import IO, Any, Self

from ilf_trt import errors
from ilf_trt.errors import EngineError, IlfError

GRACE_S = 10.0  # for a process to end by itself
LAST_CHARS = 400  # of what a dead process printed


class ChildProcess:
    """`python -m MODULE`, ended with its block, however that ends."""

    def __init__(self, module: str, environment: Mapping[str, str]) -> None:
        """Start it with `environment` on top of this process's."""
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                env={**os.environ, **environment},
            )
        except BaseException:
            self._errors.close()
            raise

    def send(self, request: Mapping[str, Any]) -> None:
        """Send one request; a process that is dead gets none, and `answers` then ends."""
        with suppress(BrokenPipeError):
            _pipe(self._process.stdin).write(json.dumps(request) + "\n")
            _pipe(self._process.stdin).flush()

    def answers(self) -> Iterator[dict[str, Any]]:
        """Whole answers as they come; ends where the process died, perhaps in the middle of a line."""
        while (line := _pipe(self._process.stdout).readline()).endswith("\n"):
            answer: dict[str, Any] = json.loads(line)
            yield answer

    def death(self) -> tuple[int, str]:
        """How a process ended whose answers ended: its exit code, -N for signal N, and the last that it printed."""
        code = self._process.wait()
        self._errors.seek(0)
        return code, " ".join(self._errors.read().split())[-LAST_CHARS:]

    def close(self) -> None:
        """Tell the process to end by closing its input, and kill it if it has not ended after `GRACE_S`."""
        try:
            with suppress(BrokenPipeError):
                _pipe(self._process.stdin).close()
            _pipe(self._process.stdout).close()  # else the process could wait for a reader
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE_S)
        finally:
            self._process.kill()
            self._process.wait()
            self._errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def error_of(answer: Mapping[str, str]) -> IlfError:
    """The error that a process told by its `kind`, a class of `ilf_trt.errors`, and its `message`."""
    kind = getattr(errors, answer["kind"], EngineError)
    made: IlfError = (kind if issubclass(kind, IlfError) else EngineError)(answer["message"])
    return made


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream
