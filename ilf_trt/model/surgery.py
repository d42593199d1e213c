"""Attaches a feedback block to a frozen backbone."""

from copy import deepcopy
from typing import Any

from torch import nn

from ilf_trt.contract.spec import Initialisation, Loop
from ilf_trt.errors import InvalidRequest

from .backbones import backbone_of
from .feedback import Feedback
from .identity import check_plain
from .ilf_model import ILFModel


def attach(
    backbone: Any, loop: tuple[int, int] | Loop, *, initialisation: Initialisation | str = Initialisation.END
) -> ILFModel:
    """A new model that shares `backbone` and adds a feedback block and zero scales.

    The block is a copy of the loop's last unless `initialisation` says otherwise. The backbone's parameters are frozen
    (`requires_grad` false) and it is put in eval mode: nothing else of it changes. Raises UnsupportedBackbone for
    another model class, InvalidRequest for a loop that does not fit, an unknown initialisation, or a backbone that
    carries an adapter (LoRA).
    """
    if initialisation not in list(Initialisation):
        raise InvalidRequest(f"initialisation is {initialisation!r}, it must be one of {', '.join(Initialisation)}")
    if isinstance(backbone, nn.Module):
        check_plain(backbone, type(backbone).__name__)
    adapter = backbone_of(backbone)
    loop = loop if isinstance(loop, Loop) else Loop(*loop)
    loop.check(len(adapter.blocks))
    backbone.requires_grad_(False).eval()
    block = deepcopy(adapter.blocks[loop.begin if initialisation == Initialisation.BEGIN else loop.end])
    if initialisation == Initialisation.ZERO:
        for layer in adapter.last_layers(block):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)
    return ILFModel(adapter, loop, Feedback(block.requires_grad_(True), loop.size))


def move_onto(model: ILFModel, backbone: Any, trained_on: str) -> ILFModel:
    """The feedback block of `model`, shared, on another base of the same architecture, such as a fine-tune.

    `trained_on` is the fingerprint of the base that the block was trained on. Raises UnsupportedBackbone, and
    InvalidRequest for a backbone that carries an adapter (LoRA).
    """
    check_plain(backbone, type(backbone).__name__)
    moved = ILFModel(backbone_of(backbone.requires_grad_(False).eval()), model.loop, model.feedback)
    moved.trained_on = trained_on
    return moved
