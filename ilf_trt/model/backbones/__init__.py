"""Finds the adapter of a model. A new backbone is one new file here that defines `ADAPTER`, or one `register` call."""

from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from ilf_trt.errors import InvalidRequest, UnsupportedBackbone, shown
from ilf_trt.model.backbone import Backbone, PipelineKind

NAME_CHARS = 80

_REGISTERED: list[type[Backbone]] = []


def register(adapter: type[Backbone]) -> Callable[[], None]:
    """Add an adapter from outside of this package; gives a call that takes it back.

    Raises InvalidRequest when its kind or its class has an adapter.
    """
    for other in adapters():
        if other.kind == adapter.kind or other.model_class() == adapter.model_class():
            raise InvalidRequest(
                f"{other.__name__} is the adapter of {other.model_class()}, kind {other.kind!r}; give "
                f"{adapter.__name__} another kind and class"
            )
    _REGISTERED.append(adapter)
    return lambda: _REGISTERED.remove(adapter)


def adapters() -> tuple[type[Backbone], ...]:
    """All adapters: those of this package, then the registered ones."""
    return (*_own_adapters(), *_REGISTERED)


def backbone_of(model: Any) -> Backbone:
    """The adapter of a transformer; raises UnsupportedBackbone."""
    names = [base.__name__ for base in type(model).__mro__]
    for adapter in adapters():
        if adapter.model_class() in names:
            return adapter(model)
    raise UnsupportedBackbone(f"no adapter for {type(model).__name__}; supported: {_classes()}")


def adapter_of_kind(kind: str) -> type[Backbone]:
    """The adapter class named in a checkpoint or bundle; raises UnsupportedBackbone."""
    for adapter in adapters():
        if adapter.kind == kind:
            return adapter
    kinds = ", ".join(sorted(adapter.kind for adapter in adapters()))
    raise UnsupportedBackbone(f"no adapter for backbone kind {kind!r}; supported: {kinds}")


def adapter_of_config(config: Mapping[str, Any]) -> type[Backbone]:
    """The adapter of a model's config.json; raises UnsupportedBackbone."""
    for adapter in adapters():
        if adapter.is_of(config):
            return adapter
    name = shown(str(config.get("_class_name")), NAME_CHARS)
    raise UnsupportedBackbone(f"no adapter for {name}; supported: {_classes()}")


def pipeline_kinds() -> dict[str, PipelineKind]:
    """Every diffusers pipeline that a backbone is served in, by the name of its class."""
    return {kind.class_name: kind for adapter in adapters() for kind in adapter.pipelines}


@cache
def _own_adapters() -> tuple[type[Backbone], ...]:
    modules = (import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__))
    return tuple(module.ADAPTER for module in modules)


def _classes() -> str:
    return ", ".join(sorted(adapter.model_class() for adapter in adapters()))
