"""Imports ONNX Runtime without its telemetry."""

import os
from importlib.util import find_spec
from typing import Any

from ilf_trt.errors import MissingDependency

SWITCH = "ORT_DISABLE_TELEMETRY"
CPU_EXTRA = "'ilf-trt[cpu]'"


def import_onnxruntime(package: str = CPU_EXTRA) -> Any:
    """The module; raises MissingDependency, which says to install `package`.

    ONNX Runtime reports to Microsoft by default: a session looks up a host, writes a device id and a database into the
    user's cache folder, and leaves threads that keep a forked child from ending. The switch must be set before the
    first import. The environment decides if it sets the switch itself. The call is for a process that imported the
    library before.
    """
    os.environ.setdefault(SWITCH, "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise _missing(package) from error
    if os.environ[SWITCH] != "0":
        onnxruntime.disable_telemetry_events()
    return onnxruntime


def onnxruntime_version() -> str:
    """`"onnxruntime 1.31.0"`, for a record; raises MissingDependency."""
    return f"onnxruntime {import_onnxruntime().__version__}"


def check_onnxruntime() -> None:
    """Raise MissingDependency if ONNX Runtime is not installed; does not load it."""
    if find_spec("onnxruntime") is None:
        raise _missing(CPU_EXTRA)


def _missing(package: str) -> MissingDependency:
    return MissingDependency(f"onnxruntime is not installed; pip install {package}")
