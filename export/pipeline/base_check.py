"""Whether a diffusers pipeline's folder goes with a checkpoint and its base."""

import logging
from pathlib import Path
from typing import Any

from ilf_trt.errors import InvalidRequest
from ilf_trt.model.backbones import adapter_of_kind
from ilf_trt.model.base import load_backbone
from ilf_trt.model.checkpoint import Checkpoint, plain_config
from ilf_trt.model.hub_folder import CONFIG, read_config
from ilf_trt.model.identity import differing_option, differing_weight
from ilf_trt.model.ilf_model import ILFModel

from .folder import PipelineFolder

log = logging.getLogger(__name__)


def check_kind(folder: PipelineFolder, facts: Checkpoint) -> None:
    """Raise InvalidRequest for a pipeline of a class that the checkpoint's model is not served in."""
    names = [kind.class_name for kind in adapter_of_kind(facts.kind).pipelines]
    if folder.kind not in names:
        raise InvalidRequest(
            f"{folder.path} is a {folder.kind}, the checkpoint is a {facts.kind}, which runs in "
            f"{' or '.join(names) or 'none'}; give the pipeline of its base"
        )


def check_base(folder: PipelineFolder, model: ILFModel, base: str, *, base_differs: bool) -> None:
    """Raise InvalidRequest for a pipeline whose transformer is another than the model's base, found at `base`.

    The folder's transformer decides: its configuration must be the base's, and its weights too unless `base_differs`.
    Without a transformer only the class of the pipeline can contradict the model, and a warning says so.
    """
    if folder.transformer is None:
        why = model.adapter.contradiction(folder.kind)
        if why is not None:
            raise InvalidRequest(f"{folder.path} is another model's: {why}; give the pipeline of the base")
        log.warning(
            "%s has no transformer: nothing says that its parts are those of the checkpoint's base", folder.path
        )
        return
    if folder.transformer.resolve() in (Path(base).resolve(), (Path(base) / folder.transformer.name).resolve()):
        return
    own: dict[str, Any] = plain_config(model.backbone)
    theirs = read_config(folder.transformer / CONFIG)
    option = differing_option(own, theirs)
    if option is not None:
        raise _another(folder, f"its {option} is {theirs[option]!r}, the base's {own[option]!r}")
    if base_differs:
        return
    weight = differing_weight(model.backbone, load_backbone(str(folder.transformer)))
    if weight is not None:
        raise _another(folder, f"{weight} has other values; for a fine-tune pass --base-differs")


def _another(folder: PipelineFolder, what: str) -> InvalidRequest:
    return InvalidRequest(
        f"{folder.transformer} is not the checkpoint's base: {what}; give the pipeline that the checkpoint was "
        "trained on"
    )
