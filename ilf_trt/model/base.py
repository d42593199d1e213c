"""The frozen base of a checkpoint or a training: a folder, or the snapshot of a hub id, with its scheduler."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ilf_trt.contract.packaged import find_packaged
from ilf_trt.contract.solver import DEFAULT_SCHEDULER
from ilf_trt.errors import CheckpointError
from ilf_trt.files import is_folder

from .backbone import Backbone
from .backbones import adapter_of_config, adapter_of_kind
from .hub_folder import CONFIG, MODEL_INDEX, download_advice, is_hub_id, local_folder, read_config
from .pretrained import DIFFUSERS, diffusers_weights, load_diffusers, model_config, options_of
from .weights import check_finite

BASE_FOLDER, SCHEDULER = "transformer", "scheduler"
SCHEDULER_FILE = f"{SCHEDULER}/scheduler_config.json"
CONFIGS = (MODEL_INDEX, CONFIG, f"{BASE_FOLDER}/{CONFIG}")
FILES = (
    *CONFIGS,
    f"{DIFFUSERS}*.safetensors",
    f"{DIFFUSERS}*.json",
    f"{BASE_FOLDER}/*.json",
    f"{BASE_FOLDER}/*.safetensors",
    SCHEDULER_FILE,
)
ADVICE = "give the folder of the base, by --base or as model.base"

log = logging.getLogger(__name__)


def load_backbone(source: str) -> Any:
    """A base to train on: a diffusers folder, a hub id, `demo`; raises CheckpointError, UnsupportedBackbone."""
    return load_base(source, None)


def load_base(source: str, kind: str | None) -> Any:
    """As `load_backbone`, in float32; CheckpointError also for a base that is not of `kind`."""
    if kind is not None:
        adapter_of_kind(kind)
    folder = _model_folder(source)
    adapter, _ = _described(folder)
    if kind not in (None, adapter.kind):
        raise CheckpointError(
            f"base {source} is another model: a {adapter.kind}, the checkpoint was trained on a {kind}; pass the base "
            "it was trained on with --base"
        )
    backbone = load_diffusers(adapter.model_type, folder)
    check_finite(backbone.state_dict(), f"the base {source}")
    return backbone


def base_config(source: str) -> tuple[str, dict[str, Any]]:
    """Kind and options of a base, without its weights, which a hub id need not have on this disk yet.

    Raises CheckpointError, UnsupportedBackbone.
    """
    folder = _model_folder(source, CONFIGS)
    adapter, options = _described(folder)
    if not _of_hub(source):
        diffusers_weights(adapter.model_type, folder)
    return adapter.kind, options


def base_source(base: str) -> str:
    """Where a base is found from any folder: a folder's absolute path, a hub id as it is, and the package's own."""
    known = find_packaged(base)
    if known is not None:
        return str(known.folder / BASE_FOLDER)
    return str(Path(base).resolve()) if is_folder(base) else base


def base_scheduler(base: str) -> dict[str, Any]:
    """The diffusers scheduler of a base; without any, DPM-Solver++ of order 2, which is then said.

    Raises CheckpointError for a scheduler that is there and cannot be read.
    """
    found = stored_scheduler(base)
    return default_scheduler(f"base {base}") if found is None else found


def default_scheduler(what: str) -> dict[str, Any]:
    """DPM-Solver++ of order 2, with a word in the log that `what` has no scheduler."""
    log.warning("%s has no scheduler: DPM-Solver++ with linear betas is used, and the model must predict noise", what)
    return dict(DEFAULT_SCHEDULER)


def stored_scheduler(base: str) -> dict[str, Any] | None:
    """The diffusers scheduler beside a base, or in the pipeline that it is a part of; raises CheckpointError."""
    root = _root(base)
    for folder in (root,) if _of_hub(base) else (root, root.parent):
        found = read_scheduler_of(folder)
        if found is not None:
            return found
    return None


def read_scheduler_of(folder: Path) -> dict[str, Any] | None:
    """The scheduler of a pipeline's folder, None if it has none; raises CheckpointError when it cannot be read."""
    path, index = folder / SCHEDULER_FILE, folder / MODEL_INDEX
    if os.path.lexists(path):
        return read_config(path)
    part = read_config(index).get(SCHEDULER) if os.path.lexists(index) else None
    if isinstance(part, list) and any(part):
        raise CheckpointError(f"{path} is missing, {MODEL_INDEX} names it; copy the whole pipeline again")
    return None


def _of_hub(source: str) -> bool:
    return is_hub_id(source) and not is_folder(source)


def _root(source: str, files: Sequence[str] = FILES) -> Path:
    """The folder of a base, which is a model's or a pipeline's."""
    known = find_packaged(source)
    if known is not None:
        return known.folder / BASE_FOLDER
    advice = f"{download_advice(source)}, and {ADVICE}" if is_hub_id(source) else ADVICE
    root = local_folder("base", source, files, advice)
    if _of_hub(source) and not any((root / name).exists() for name in (MODEL_INDEX, CONFIG)):
        raise CheckpointError(f"base {source} is in the hub's cache without its {MODEL_INDEX}; {advice}")
    return root


def _model_folder(source: str, files: Sequence[str] = FILES) -> Path:
    root = _root(source, files)
    inner = root / BASE_FOLDER
    return root if (root / CONFIG).is_file() or not inner.is_dir() else inner


def _described(folder: Path) -> tuple[type[Backbone], dict[str, Any]]:
    """The adapter, and the options of the model."""
    config = model_config(folder)
    adapter = adapter_of_config(config)
    return adapter, options_of(adapter.model_type, config, folder)
