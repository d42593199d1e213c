"""The process that loads an engine library: one JSON request on its input, JSON lines on its output.

    python -m ilf_trt.engines.worker

The library lives and dies here: its memory is given back, its crash is an exit code, and no other process needs it.
When the input closes, whoever asked is gone or wants no more: the build is cancelled, and the process ends soon.
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
from ilf_trt.engines.builder import BuildRequest, build_engine
from ilf_trt.engines.library import probe
from ilf_trt.errors import IlfError

LINGER_S = 5.0  # for a cancelled builder to reach its next step, and to leave its timing cache whole


def main() -> int:
    """Serve one request; 0 when it was answered, with a result or with an error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = _Answers(os.dup(1))
    os.dup2(2, 1)  # what a library prints is no answer
    request = json.loads(sys.stdin.readline())
    cancelled = threading.Event()
    threading.Thread(target=_watch, args=(cancelled,), daemon=True).start()
    try:
        answers.say(result=_serve(request, answers, cancelled))
    except IlfError as error:
        answers.say(error={"kind": type(error).__name__, "message": str(error)})
    except MemoryError:
        answers.say(error={"kind": "EngineError", "message": _OUT_OF_MEMORY})
    except OSError as error:
        answers.say(os_error={"errno": error.errno, "strerror": error.strerror, "file": error.filename})
    os._exit(0)  # the library's own teardown has crashed without a driver


_OUT_OF_MEMORY = "memory ran out while building; pass a smaller --batch or --workspace, or build where there is more"


class _Answers:
    """JSON lines for whoever asked, from any thread; nothing when nobody reads them any more."""

    def __init__(self, descriptor: int) -> None:
        self._file = os.fdopen(descriptor, "w", buffering=1)
        self._lock = threading.Lock()

    def say(self, **message: Any) -> None:
        with self._lock, suppress(BrokenPipeError):
            self._file.write(json.dumps(message) + "\n")


def _serve(request: dict[str, Any], answers: _Answers, cancelled: threading.Event) -> dict[str, Any]:
    if request["do"] == "probe":
        return probe(Library(request["library"])).as_json()

    def tell(phase: str, done: int, total: int) -> None:
        answers.say(progress=[phase, done, total])

    return build_engine(BuildRequest.from_json(request["engine"]), tell, cancelled.is_set).as_json()


def _watch(cancelled: threading.Event) -> None:
    sys.stdin.read()
    cancelled.set()
    time.sleep(LINGER_S)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
