"""The loop of a process that measures: one JSON request a line comes in, one JSON answer a line goes out."""

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

from ilf_trt.errors import IlfError, one_line

Answer = Callable[[Mapping[str, Any]], Mapping[str, Any]]


def serve(answers: Mapping[str, Answer]) -> int:
    """Answer requests by the value of their `do` until the input closes; returns the exit code 0.

    What libraries print goes to standard error, so that no answer is torn. The parent handles SIGINT for both.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    output = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer: dict[str, Any] = {"result": dict(answers[request["do"]](request))}
        except IlfError as error:
            answer = {"error": {"kind": type(error).__name__, "message": str(error)}}
        except MemoryError as error:
            answer = {"error": {"kind": "OutOfMemory", "message": f"memory ran out ({one_line(error)})"}}
        except Exception as error:  # another library's: it fails one row, the others go on
            answer = {"error": {"kind": "IlfError", "message": f"{type(error).__name__}: {one_line(error)}"}}
        output.write(json.dumps(answer) + "\n")
    return 0
