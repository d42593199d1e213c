"""The transformer that a drop-in replaces: whether it is the base of the model that takes its place."""

from typing import Any

import torch

from ilf_trt.contract.manifest import Manifest
from ilf_trt.errors import InvalidRequest
from ilf_trt.model.backbone import Backbone
from ilf_trt.model.backbones import pipeline_kinds
from ilf_trt.model.checkpoint import fingerprint
from ilf_trt.model.identity import HALVES, check_plain, differing_option, differing_weight
from ilf_trt.model.ilf_model import ILFModel
from ilf_trt.model.surgery import move_onto

NAMELESS = {"out_channels"}  # a served model has no learned variance


def replaced_transformer(pipe: Any, adapter: type[Backbone], config: Any) -> Any:
    """The transformer of `pipe`, or None; raises InvalidRequest when there is no place for a model of `config`."""
    name, kinds = type(pipe).__name__, pipeline_kinds()
    for part in ("transformer", "scheduler"):
        if not hasattr(pipe, part):
            raise InvalidRequest(f"{name} has no {part}; give a diffusers pipeline such as {', '.join(kinds)}")
    served = {kind.class_name for kind in adapter.pipelines}
    classes = {base.__name__ for base in type(pipe).__mro__}
    if classes & kinds.keys() and not classes & served:
        raise InvalidRequest(f"{name} is no pipeline of a {adapter.kind}; give {' or '.join(sorted(served)) or 'none'}")
    replaced = getattr(pipe.transformer, "_orig_mod", pipe.transformer)  # as torch.compile wraps it
    if replaced is None:
        return None
    ours, theirs = dict(config), dict(replaced.config)
    option = differing_option(ours, theirs, without=NAMELESS)
    if option is not None:
        raise InvalidRequest(
            f"{name} has another transformer than the model's: its {option} is {theirs[option]!r}, the "
            f"model's {ours[option]!r}; load the pipeline of the model's base"
        )
    return replaced


def model_for(replaced: Any, model: ILFModel, *, base_differs: bool) -> ILFModel:
    """`model`, or with `base_differs` its feedback block on the transformer that it replaces, if that is another base.

    Raises InvalidRequest for another base without `base_differs`, and for one that carries an adapter (LoRA).
    """
    check_plain(model.backbone, "the model's backbone")
    if replaced is None:
        return model
    sha256, base = _served_sha256(replaced), _base_of(replaced)
    if sha256 is not None and sha256 != fingerprint(model.backbone):
        raise _another("it serves a bundle of another base")
    if sha256 is not None or base is model.backbone:
        return model
    check_plain(base, "the pipeline's transformer")
    weight = differing_weight(model.backbone, base)
    if weight is None:
        return model
    if not base_differs:
        raise _another(f"its {weight} has other values; for a fine-tune pass base_differs=True")
    return move_onto(model, base, model.trained_on or fingerprint(model.backbone))


def check_bundle(replaced: Any, manifest: Manifest) -> None:
    """Raise InvalidRequest for a transformer that is another than the base of a bundle."""
    sha256, base, wanted = _served_sha256(replaced), _base_of(replaced), manifest.base_sha256
    if sha256 is None:
        check_plain(base, "the pipeline's transformer")
        dtype = base.dtype if base.dtype in HALVES else torch.float32
        wanted = manifest.base_rounded_sha256.get(str(dtype).removeprefix("torch."), wanted)
        sha256 = fingerprint(base, dtype)
    if sha256 != wanted:
        raise InvalidRequest(
            "the pipeline's transformer has other weights than the bundle's base; build a bundle of it with "
            "--pipeline and --base-differs, or load the pipeline with transformer=None to replace it"
        )


def _base_of(replaced: Any) -> Any:
    """The base in a transformer: an eager drop-in's own, or the transformer itself."""
    return getattr(replaced, "base", replaced)


def _served_sha256(replaced: Any) -> str | None:
    """The fingerprint of a served drop-in's base, which has no weights."""
    return getattr(replaced, "base_sha256", None)


def _another(what: str) -> InvalidRequest:
    return InvalidRequest(f"the pipeline's transformer is not the model's base: {what}; load the pipeline of the base")
