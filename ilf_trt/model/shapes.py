"""A backbone of shapes alone: what a config makes, bounded, before any weight takes memory."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from ilf_trt.errors import UnsupportedBackbone, one_line

from .backbones import adapter_of_kind

MOST_MODULES = 1 << 13
MOST_PARAMETERS = 1 << 40


class _TooLarge(Exception):
    """A model of more modules or parameters than any real one."""


def backbone_of_shapes(kind: str, config: Mapping[str, Any]) -> Any:
    """The backbone of a config on torch's meta device, without weights; keys that begin with `_` are notes.

    Raises UnsupportedBackbone for a kind without an adapter, a config that its class refuses, and for a model of more
    than MOST_MODULES modules or MOST_PARAMETERS parameters, soon and without memory.
    """
    model_type = adapter_of_kind(kind).model_type
    options = {name: value for name, value in config.items() if not name.startswith("_")}
    try:
        with _bounded(), torch.device("meta"):
            backbone = model_type(**options)
            nn.Module.to(backbone, "meta")  # some position embeddings come from numpy
    except Exception as error:  # a class of others raises anything for a value that it did not foresee
        raise UnsupportedBackbone(
            f"no {model_type.__name__} can be made of this config: {one_line(error)}; correct its options"
        ) from error
    return backbone


@contextmanager
def _bounded() -> Iterator[None]:
    """Count modules and parameters as torch registers them, and end the making of a model that has too many."""
    modules = parameters = 0

    def count_module(*_: Any) -> None:
        nonlocal modules
        modules += 1
        if modules > MOST_MODULES:
            raise _TooLarge(f"it has more than {MOST_MODULES} modules")

    def count_parameter(_: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal parameters
        parameters += 0 if parameter is None else parameter.numel()
        if parameters > MOST_PARAMETERS:
            raise _TooLarge(f"it has more than {MOST_PARAMETERS} parameters")

    hooks = (
        torch_module.register_module_module_registration_hook(count_module),
        torch_module.register_module_parameter_registration_hook(count_parameter),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
