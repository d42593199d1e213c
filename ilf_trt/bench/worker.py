"""A process that measures, as its parent sees it: started, asked, and ended."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from time import perf_counter
from types import TracebackType
from typing import IO, Any, Self

from ilf_trt import errors
from ilf_trt.errors import EngineError, IlfError

GRACE_S = 10.0
LAST_CHARS = 400  # of what a dead process printed


class Worker:
    """One process; its module answers requests as `answering.serve` does. `process_s` is the time of its start."""

    def __init__(self, module: str, *, threads: int = 0) -> None:
        """Start `python -m MODULE`; with `threads`, libraries of the process use so many."""
        begin_s = perf_counter()
        self._module = module
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        limits = {"OMP_NUM_THREADS": str(threads)} if threads else {}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, **limits},
        )
        try:
            self.facts = self.ask("facts")
        except BaseException:
            self.close()
            raise
        self.process_s = perf_counter() - begin_s

    def ask(self, do: str, /, **fields: Any) -> dict[str, Any]:
        """The answer to one request; raises the error of the process, and EngineError if the process has died."""
        with suppress(BrokenPipeError):
            _pipe(self._process.stdin).write(json.dumps({"do": do, **fields}) + "\n")
            _pipe(self._process.stdin).flush()
        line = _pipe(self._process.stdout).readline()
        if not line.endswith("\n"):
            raise EngineError(self._death())
        answer = json.loads(line)
        if "error" in answer:
            raise _error(answer["error"])
        result: dict[str, Any] = answer["result"]
        return result

    def close(self) -> None:
        """End the process, at the latest after ten seconds."""
        try:
            with suppress(BrokenPipeError):
                _pipe(self._process.stdin).close()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE_S)
        finally:
            self._process.kill()
            self._process.wait()
            _pipe(self._process.stdout).close()
            self._errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _death(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        last = " ".join(self._errors.read().split())[-LAST_CHARS:]
        how = f"was ended by signal {-code}, perhaps because memory ran out" if code < 0 else f"ended with code {code}"
        return f"the process {self._module} {how}{f': {last}' if last else ''}; use a smaller --batch"


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def _error(error: Mapping[str, str]) -> IlfError:
    kind = getattr(errors, error["kind"], IlfError)
    made: IlfError = kind(error["message"])
    return made
