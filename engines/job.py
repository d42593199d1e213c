"""Sends one request to a worker process: passes its progress on, and explains its death."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

from ilf_trt import errors
from ilf_trt.contract.progress import Progress, no_progress
from ilf_trt.contract.target import Library
from ilf_trt.errors import EngineError, IlfError

SWITCH = "POLYGRAPHY_USE_TENSORRT_RTX"  # Polygraphy reads it once, when it is imported
GRACE_S = 10.0  # for a worker to end by itself
LAST_CHARS = 400  # of what a dead worker printed


def ask(library: Library, request: dict[str, Any], tell: Progress = no_progress) -> dict[str, Any]:
    """The worker's answer to `request`; each progress line calls `tell(phase, done, total)`.

    Raises the worker's own error, EngineError if the worker died, and OSError with the worker's errno. An interrupt
    cancels the build and leaves no process behind.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as stderr, _worker(library, stderr) as process:
        with suppress(BrokenPipeError):  # the worker died at once; its exit code says why
            _pipe(process.stdin).write(json.dumps(request) + "\n")
            _pipe(process.stdin).flush()
        for line in _pipe(process.stdout):
            if not line.endswith("\n"):
                break  # the worker died in the middle of a line
            answer = json.loads(line)
            if "progress" in answer:
                tell(*answer["progress"])
            elif "result" in answer:
                result: dict[str, Any] = answer["result"]
                return result
            else:
                raise _error(answer)
        code = process.wait()
        stderr.seek(0)
        raise EngineError(_death(code, stderr.read()))


@contextmanager
def _worker(library: Library, stderr: Any) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "ilf_trt.engines.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env={**os.environ, SWITCH: "1" if library is Library.TENSORRT_RTX else "0"},
    )
    try:
        yield process
    finally:
        try:
            with suppress(BrokenPipeError):
                _pipe(process.stdin).close()
            _pipe(process.stdout).close()  # else the worker could wait for a reader
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
        finally:
            process.kill()
            process.wait()


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def _error(answer: dict[str, Any]) -> Exception:
    if "os_error" in answer:
        fields = answer["os_error"]
        return OSError(fields["errno"], fields["strerror"], fields["file"])
    kind = getattr(errors, answer["error"]["kind"], EngineError)
    return kind(answer["error"]["message"]) if issubclass(kind, IlfError) else EngineError(answer["error"]["message"])


def _death(code: int, output: str) -> str:
    if code == -signal.SIGKILL:
        return (
            "the builder process was killed, probably because memory ran out; pass a smaller --batch or --workspace, "
            "or build on a machine with more memory"
        )
    end = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    last = " ".join(output.split())[-LAST_CHARS:]
    return f"the builder process {end}{f': {last}' if last else ''}; report this, with the graph, to ilf-trt"
