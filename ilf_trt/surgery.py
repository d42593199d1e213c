"""Attaches a feedback block to a frozen backbone."""

from copy import deepcopy
from typing import Any

from ilf_trt.backbones import backbone_of
from ilf_trt.contract import Loop
from ilf_trt.feedback import Feedback
from ilf_trt.model import ILFModel


def attach(backbone: Any, loop: tuple[int, int] | Loop) -> ILFModel:
    """A new model that shares `backbone` and adds a feedback block, copied from the loop's last, and zero scales.

    The backbone's parameters are frozen (`requires_grad` false) and it is put in eval mode: nothing else of it changes.
    Raises UnsupportedBackbone for another model class, InvalidRequest for a loop that does not fit.
    """
    adapter = backbone_of(backbone)
    loop = loop if isinstance(loop, Loop) else Loop(*loop)
    loop.check(len(adapter.blocks))
    backbone.requires_grad_(False).eval()
    block = deepcopy(adapter.blocks[loop.end]).requires_grad_(True)
    return ILFModel(adapter, loop, Feedback(block, loop.size))
