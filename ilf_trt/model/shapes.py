"""Models of shapes alone, on torch's meta device: bounded while they are made, before any weight takes memory."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ilf_trt.errors import IlfError, UnsupportedBackbone, one_line

from .backbones import adapter_of_kind

MOST_TENSORS = 1 << 14


@contextmanager
def no_larger(most: int, refusal: IlfError) -> Iterator[None]:
    """On the meta device; raises `refusal` as soon as a module of this thread has more than `most` parameters."""
    made, thread = 0, threading.get_ident()

    def count(*_: object) -> None:
        nonlocal made
        made += threading.get_ident() == thread
        if made > most:
            raise refusal

    handle = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            yield
    finally:
        handle.remove()


def backbone_of_shapes(kind: str, config: Mapping[str, Any]) -> Any:
    """The backbone of a config without weights; keys that begin with `_` are notes.

    Raises UnsupportedBackbone for a kind without an adapter, a config that its class refuses, and a model of more than
    MOST_TENSORS tensors.
    """
    model_type = adapter_of_kind(kind).model_type
    options = {name: value for name, value in config.items() if not name.startswith("_")}
    too_large = UnsupportedBackbone(f"{kind}: the config asks for more than {MOST_TENSORS} tensors; give fewer layers")
    try:
        with no_larger(MOST_TENSORS, too_large):
            backbone = model_type(**options)
            nn.Module.to(backbone, "meta")  # some position embeddings come from numpy
    except IlfError:
        raise
    except Exception as error:  # a class of others raises anything for a value that it did not foresee
        raise UnsupportedBackbone(
            f"no {model_type.__name__} can be made of this config: {one_line(error)}; correct its options"
        ) from error
    return backbone
