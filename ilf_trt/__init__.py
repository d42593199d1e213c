"""ilf-trt: what an Inner Loop Feedback model is, torch-free until a model is asked for."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ilf_trt.checkpoint import load_ilf, save_ilf
    from ilf_trt.model import ILFModel
    from ilf_trt.served_transformer import ServedTransformer
    from ilf_trt.surgery import attach
    from ilf_trt.transformer import ILFTransformer

__version__ = "0.1.0"
__all__ = ["ILFModel", "ILFTransformer", "ServedTransformer", "__version__", "attach", "load_ilf", "save_ilf"]

_HOMES = {
    "ILFModel": "ilf_trt.model",
    "ILFTransformer": "ilf_trt.transformer",
    "ServedTransformer": "ilf_trt.served_transformer",
    "attach": "ilf_trt.surgery",
    "load_ilf": "ilf_trt.checkpoint",
    "save_ilf": "ilf_trt.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ilf_trt' has no attribute {name!r}; it has {', '.join(sorted(_HOMES))}")
    return getattr(import_module(_HOMES[name]), name)
