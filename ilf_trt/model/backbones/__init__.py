"""Finds the adapter of a model; a further backbone is one new file here that defines `ADAPTER`."""

from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from ilf_trt.errors import UnsupportedBackbone
from ilf_trt.model.backbone import Backbone


def backbone_of(model: Any) -> Backbone:
    """The adapter of a diffusers transformer; raises UnsupportedBackbone."""
    names = [base.__name__ for base in type(model).__mro__]
    for adapter in _adapters():
        if adapter.model_class in names:
            return adapter(model)
    raise UnsupportedBackbone(f"no adapter for {type(model).__name__}; supported: {_supported()}")


def adapter_of_kind(kind: str) -> type[Backbone]:
    """The adapter class named in a checkpoint or bundle; raises UnsupportedBackbone."""
    for adapter in _adapters():
        if adapter.kind == kind:
            return adapter
    kinds = ", ".join(sorted(adapter.kind for adapter in _adapters()))
    raise UnsupportedBackbone(f"no adapter for backbone kind {kind!r}; supported: {kinds}")


def adapter_of_class(model_class: str) -> type[Backbone]:
    """The adapter of a diffusers class name, as it stands in a model's config.json; raises UnsupportedBackbone."""
    for adapter in _adapters():
        if adapter.model_class == model_class:
            return adapter
    raise UnsupportedBackbone(f"no adapter for {model_class}; supported: {_supported()}")


@cache
def _adapters() -> tuple[type[Backbone], ...]:
    modules = (import_module(f"{__name__}.{found.name}") for found in iter_modules(__path__))
    return tuple(module.ADAPTER for module in modules)


def _supported() -> str:
    return ", ".join(sorted(adapter.model_class for adapter in _adapters()))
