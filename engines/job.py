"""One request to a worker process, from the side that asks: progress handed on, death put into words."""

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
from ilf_trt.contract.target import Library
from ilf_trt.engines.progress import Tell
from ilf_trt.errors import EngineError, IlfError

SWITCH = "POLYGRAPHY_USE_TENSORRT_RTX"  # Polygraphy reads it once, when it is imported
GRACE_S = 10.0
WORDS = 400


def ask(library: Library, request: dict[str, Any], tell: Tell = lambda phase, done, total: None) -> dict[str, Any]:
    """The worker's answer to `request`; raises what the worker raised, EngineError when it died, OSError as it met it.

    An interrupt cancels the build and leaves no process behind.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as words, _worker(library, words) as process:
        with suppress(BrokenPipeError):  # it died at once; its end says why
            _pipe(process.stdin).write(json.dumps(request) + "\n")
            _pipe(process.stdin).flush()
        for line in _pipe(process.stdout):
            if not line.endswith("\n"):
                break  # it died in the middle of a word
            answer = json.loads(line)
            if "progress" in answer:
                tell(*answer["progress"])
            elif "result" in answer:
                result: dict[str, Any] = answer["result"]
                return result
            else:
                raise _error(answer)
        code = process.wait()
        words.seek(0)
        raise EngineError(_death(code, words.read()))


@contextmanager
def _worker(library: Library, words: Any) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "ilf_trt.engines.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=words,
        text=True,
        env={**os.environ, SWITCH: "1" if library is Library.TENSORRT_RTX else "0"},
    )
    try:
        yield process
    finally:
        try:
            with suppress(BrokenPipeError):
                _pipe(process.stdin).close()
            _pipe(process.stdout).close()  # it must not wait for a reader
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
        met = answer["os_error"]
        return OSError(met["errno"], met["strerror"], met["file"])
    kind = getattr(errors, answer["error"]["kind"], EngineError)
    return kind(answer["error"]["message"]) if issubclass(kind, IlfError) else EngineError(answer["error"]["message"])


def _death(code: int, words: str) -> str:
    if code == -signal.SIGKILL:
        return (
            "the builder process was killed, as happens when memory runs out; pass a smaller --batch or --workspace, "
            "or build where there is more memory"
        )
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    last = " ".join(words.split())[-WORDS:]
    return f"the builder process {how}{f': {last}' if last else ''}; report this, with the graph, to ilf-trt"
