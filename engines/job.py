"""Sends one request to a worker process: passes its progress on, and explains its death."""

import signal
from typing import Any

from ilf_trt.child_process import ChildProcess, error_of
from ilf_trt.contract.progress import Progress, no_progress
from ilf_trt.contract.target import Library
from ilf_trt.errors import EngineError

WORKER = "ilf_trt.engines.worker"
SWITCH = "POLYGRAPHY_USE_TENSORRT_RTX"  # Polygraphy reads it once, when it is imported


def ask(library: Library, request: dict[str, Any], tell: Progress = no_progress) -> dict[str, Any]:
    """The worker's answer to `request`; each progress line calls `tell(phase, done, total)`.

    Raises the worker's own error, EngineError if the worker died, and OSError with the worker's errno. An interrupt
    cancels the build and leaves no process behind.
    """
    with ChildProcess(WORKER, {SWITCH: "1" if library is Library.TENSORRT_RTX else "0"}) as worker:
        worker.send(request)
        for answer in worker.answers():
            if "progress" in answer:
                tell(*answer["progress"])
            elif "result" in answer:
                result: dict[str, Any] = answer["result"]
                return result
            else:
                raise _error(answer)
        raise EngineError(_death(*worker.death()))


def _error(answer: dict[str, Any]) -> Exception:
    if "os_error" in answer:
        fields = answer["os_error"]
        return OSError(fields["errno"], fields["strerror"], fields["file"])
    return error_of(answer["error"])


def _death(code: int, last: str) -> str:
    if code == -signal.SIGKILL:
        return (
            "the builder process was killed, probably because memory ran out; pass a smaller --batch or --workspace, "
            "or build on a machine with more memory"
        )
    end = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"the builder process {end}{f': {last}' if last else ''}; report this, with the graph, to ilf-trt"
