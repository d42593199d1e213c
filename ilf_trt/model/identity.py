"""Whether a module is a plain base, and whether two bases have the same weights."""

from collections.abc import Iterator, Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn

from ilf_trt.errors import InvalidRequest

INJECTED = ("base_layer", "lora_A", "lora_B", "lora_embedding_A")
"""What PEFT puts inside of a layer that it wraps."""
HALVES = (torch.float16, torch.bfloat16)
"""A pipeline loaded in one of these, or from weights saved in it, still has the base that it was rounded from."""


def check_plain(module: nn.Module, what: str) -> None:
    """Raise InvalidRequest when PEFT or an attention processor has put weights of its own into `module`."""
    name = next(_injected(module), None)
    if name is not None:
        raise InvalidRequest(
            f"{what} has an adapter (LoRA or the like) in {name!r}, which a base cannot carry; fuse it with "
            "merge_and_unload(), or with fuse_lora() and unload_lora_weights(), and pass base_differs "
            "(--base-differs) for the fused weights"
        )


def differing_weight(base: nn.Module, other: nn.Module) -> str | None:
    """The first weight of `other` that is not that of `base`, nor that rounded to a half; None if all are the same.

    Reads every weight once. Raises InvalidRequest for weights that are offloaded.
    """
    own, theirs = (dict(module.state_dict()) for module in (base, other))
    alone = sorted(own.keys() ^ theirs.keys())
    if alone:
        return alone[0]
    for name, tensor in theirs.items():
        if tensor.is_meta:
            raise InvalidRequest(
                f"the weights of {type(other).__name__} are offloaded and cannot be compared; install before offloading"
            )
        if own[name].shape != tensor.shape or not _same(own[name].detach(), tensor.detach()):
            return name
    return None


def differing_option(
    config: Mapping[str, Any], other: Mapping[str, Any], *, without: Set[str] = frozenset()
) -> str | None:
    """The first option that two configurations both have and that differs; None if there is none."""
    names = sorted((config.keys() & other.keys()) - without)
    return next((name for name in names if not name.startswith("_") and config[name] != other[name]), None)


def _same(own: Tensor, theirs: Tensor) -> bool:
    own, theirs = own.cpu(), theirs.cpu()
    return any(torch.equal(own.to(dtype).to(theirs.dtype), theirs) for dtype in (theirs.dtype, *HALVES))


def _injected(module: nn.Module) -> Iterator[str]:
    for path, part in module.named_modules():
        if type(part).__module__.startswith("peft.tuners") or any(_holds(part, name) for name in INJECTED):
            yield path
        processor: Any = getattr(part, "processor", None)
        if isinstance(processor, nn.Module) and any(True for _ in processor.parameters()):
            yield f"{path}.processor"
    if getattr(module, "_hf_peft_config_loaded", False) or getattr(module, "peft_config", None):
        yield "peft_config"


def _holds(part: nn.Module, name: str) -> bool:
    return isinstance(getattr(part, name, None), nn.Module | nn.Parameter)
