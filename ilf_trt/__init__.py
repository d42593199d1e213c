"""ilf-trt: what an Inner Loop Feedback model is, torch-free until you use a model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .drop_in.eager import ILFTransformer
    from .drop_in.served import ServedTransformer
    from .model.checkpoint import load_ilf, save_ilf
    from .model.ilf_model import ILFModel
    from .model.surgery import attach

__version__ = "0.1.0"
__all__ = ["ILFModel", "ILFTransformer", "ServedTransformer", "__version__", "attach", "load_ilf", "save_ilf"]

_HOMES = {
    "ILFModel": "ilf_trt.model.ilf_model",
    "ILFTransformer": "ilf_trt.drop_in.eager",
    "ServedTransformer": "ilf_trt.drop_in.served",
    "attach": "ilf_trt.model.surgery",
    "load_ilf": "ilf_trt.model.checkpoint",
    "save_ilf": "ilf_trt.model.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ilf_trt' has no attribute {name!r}; it has {', '.join(sorted(_HOMES))}")
    return getattr(import_module(_HOMES[name]), name)
