"""The process that loads an engine library: reads one JSON request, writes JSON lines.

    python -m ilf_trt.engines.worker

The end of the process frees the library's memory, and a crash of the library is only an exit code. When the input
closes, the client is gone or has cancelled: the build stops, and the process ends soon.
"""

import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import Any

from ilf_trt.contract.target import Library
from ilf_trt.errors import IlfError

from .builder import BuildRequest, build_engine
from .library import probe

LINGER_S = 5.0  # for a cancelled builder to reach its next step and to complete its timing cache


def main() -> int:
    """Serve one request; returns 0 after an answer, which is a result or an error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = _Answers(os.dup(1))
    os.dup2(2, 1)  # the library prints to standard error, so that it cannot write an answer
    request = json.loads(sys.stdin.readline())
    cancelled = threading.Event()
    threading.Thread(target=_watch, args=(cancelled,), daemon=True).start()
    try:
        answers.write(result=_serve(request, answers, cancelled))
    except IlfError as error:
        answers.write(error={"kind": type(error).__name__, "message": str(error)})
    except MemoryError:
        answers.write(error={"kind": "EngineError", "message": _OUT_OF_MEMORY})
    except OSError as error:
        answers.write(os_error={"errno": error.errno, "strerror": error.strerror, "file": error.filename})
    os._exit(0)  # the library's teardown has crashed on machines without a driver


_OUT_OF_MEMORY = (
    "memory ran out during the build; pass a smaller --batch or --workspace, or build on a machine with more"
)


class _Answers:
    """Writes JSON lines to the client, from any thread; writes nothing after the client has gone."""

    def __init__(self, descriptor: int) -> None:
        self._file = os.fdopen(descriptor, "w", buffering=1)
        self._lock = threading.Lock()

    def write(self, **message: Any) -> None:
        with self._lock, suppress(BrokenPipeError):
            self._file.write(json.dumps(message) + "\n")


def _serve(request: dict[str, Any], answers: _Answers, cancelled: threading.Event) -> dict[str, Any]:
    if request["do"] == "probe":
        return probe(Library(request["library"])).as_json()

    def tell(phase: str, done: int, total: int, detail: str = "", /) -> None:
        answers.write(progress=[phase, done, total])

    return build_engine(BuildRequest.from_json(request["engine"]), tell, cancelled.is_set).as_json()


def _watch(cancelled: threading.Event) -> None:
    sys.stdin.read()
    cancelled.set()
    time.sleep(LINGER_S)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
