"""The ILF checkpoint: a folder with `ilf.json` and `ilf.safetensors`, the feedback block and its scales."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ilf_trt.contract.document import DocumentError, read_json
from ilf_trt.contract.packaged import find_packaged
from ilf_trt.contract.spec import Loop
from ilf_trt.errors import CheckpointError, InvalidRequest

from .base import BASE_FOLDER, default_scheduler, load_base, read_scheduler_of, stored_scheduler
from .hub_folder import is_folder
from .ilf_model import ILFModel
from .surgery import attach
from .weights import check_finite

SCHEMA = 1
FACTS_FILE = "ilf.json"
WEIGHTS_FILE = "ilf.safetensors"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What `ilf.json` says; `base` is a folder relative to the checkpoint, a path, or a hub id."""

    folder: Path
    kind: str
    base: str
    base_sha256: str
    loop: Loop
    config: dict[str, Any]
    training: dict[str, Any]

    def scheduler_config(self) -> dict[str, Any]:
        """The diffusers scheduler beside the checkpoint or beside its base; else DPM-Solver++ of order 2.

        Raises CheckpointError for a scheduler that is there and cannot be read.
        """
        own = self.stored_scheduler()
        return default_scheduler(str(self.folder)) if own is None else own

    def stored_scheduler(self) -> dict[str, Any] | None:
        """As `scheduler_config`, None if there is none."""
        own = read_scheduler_of(self.folder)
        return stored_scheduler(self.base) if own is None else own

    def load(self) -> ILFModel:
        """The model on its base; raises as `load_ilf` does."""
        source = self.base
        backbone = load_base(source, self.kind)
        sha256 = fingerprint(backbone)
        if sha256 != self.base_sha256:
            raise CheckpointError(
                f"base {source} is another model: its weights hash to {sha256[:12]}…, the checkpoint was trained on "
                f"{self.base_sha256[:12]}…; pass the base it was trained on with --base"
            )
        config = plain_config(backbone)
        for name, value in self.config.items():
            if name in config and config[name] != value:
                raise CheckpointError(
                    f"base {source} is another model: its {name} is {config[name]!r}, the checkpoint was trained "
                    f"on {value!r}; pass the base it was trained on with --base"
                )
        try:
            model = attach(backbone, self.loop)
        except InvalidRequest as error:
            raise CheckpointError(f"{self.folder / FACTS_FILE}: {error}") from error
        load_feedback(model, self.folder / WEIGHTS_FILE)
        return model


def save_ilf(
    model: ILFModel,
    folder: str | Path,
    *,
    base: str | None = None,
    base_sha256: str | None = None,
    training: dict[str, Any] | None = None,
) -> None:
    """Write the feedback block, the scales and what they belong to.

    `base` says where the frozen backbone is found again: a folder relative to `folder`, a path, or a hub id;
    without it the backbone is written beside, as `transformer/`. `base_sha256` is its fingerprint if you know it.
    Raises CheckpointError when a weight is not finite.
    """
    folder = Path(folder)
    state = _feedback_state(model)
    folder.mkdir(parents=True, exist_ok=True)
    if base is None:
        base = BASE_FOLDER
        model.backbone.save_pretrained(folder / base)  # type: ignore[operator]
    facts = {
        "schema": SCHEMA,
        "kind": model.adapter.kind,
        "loop": [model.loop.begin, model.loop.end],
        "base": {"source": base, "sha256": base_sha256 or fingerprint(model.backbone)},
        "config": plain_config(model.backbone),
        "training": training or {},
    }
    save_file(state, folder / WEIGHTS_FILE)
    (folder / FACTS_FILE).write_text(json.dumps(facts, indent=2) + "\n")


def load_ilf(folder: str | Path, *, base: str | Path | None = None) -> ILFModel:
    """Read a checkpoint and its base; `"demo"` and `"demo-emoji"` are in the package, `base` says where the base is.

    Raises CheckpointError when a file is missing or damaged, a weight is not finite, or the base is another model,
    UnsupportedBackbone for a kind without an adapter.
    """
    checkpoint = read_checkpoint(folder)
    return checkpoint.load() if base is None else replace(checkpoint, base=str(base)).load()


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """What `ilf.json` says, checked; raises CheckpointError."""
    known = find_packaged(str(folder))
    folder = Path(folder) if known is None else known.folder
    path = folder / FACTS_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} is not an ILF checkpoint: {FACTS_FILE} is missing; write one with save_ilf")
    facts = read_json_object(path)
    if facts.get("schema") != SCHEMA:
        raise CheckpointError(f"{path}: schema {facts.get('schema')!r}, this version reads {SCHEMA}; upgrade ilf-trt")
    try:
        begin, end = (int(value) for value in facts["loop"])
        source, sha256 = str(facts["base"]["source"]), str(facts["base"]["sha256"])
        kind, config, training = str(facts["kind"]), dict(facts["config"]), dict(facts["training"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path}: field missing or of the wrong type ({error!r}); write it again") from error
    local = folder / source
    base = str(local) if is_folder(local) else source
    return Checkpoint(folder, kind, base, sha256, Loop(begin, end), config, training)


def plain_config(backbone: Any) -> dict[str, Any]:
    """A backbone's own options as JSON keeps them, without diffusers' notes on where they came from."""
    options = {name: value for name, value in dict(backbone.config).items() if not name.startswith("_")}
    plain: dict[str, Any] = json.loads(json.dumps(options, default=str))
    return plain


def fingerprint(module: nn.Module) -> str:
    """sha256 over names, shapes and values of the weights, widened to float32 so that a lossless cast keeps it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().data)
    return digest.hexdigest()


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object in a file; raises CheckpointError."""
    try:
        return read_json(path)
    except DocumentError as error:
        raise CheckpointError(f"{error}; restore the file") from error


def save_feedback(model: ILFModel, path: Path) -> None:
    """Write F and s into one file; raises CheckpointError when a weight is not finite."""
    save_file(_feedback_state(model), path)


def _feedback_state(model: ILFModel) -> dict[str, Tensor]:
    """F and s on the CPU, checked; raises CheckpointError when a weight is not finite."""
    state = {name: tensor.detach().contiguous().cpu() for name, tensor in model.feedback.state_dict().items()}
    check_finite(state, "the feedback block")
    return state


def load_feedback(model: ILFModel, path: Path) -> None:
    """Read F and s from one file; raises CheckpointError when it is missing, damaged or of another model."""
    try:
        state = load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; copy it beside {FACTS_FILE}") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or cut short ({error}); copy it again") from error
    wanted = {name: tuple(tensor.shape) for name, tensor in model.feedback.state_dict().items()}
    got = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if got != wanted:
        name = min(set(got.items()) ^ set(wanted.items()))[0]
        raise CheckpointError(
            f"{path}: {name} is {got.get(name, 'missing')}, expected {wanted.get(name, 'no such tensor')}; "
            "it belongs to another loop or backbone"
        )
    check_finite(state, str(path))
    model.feedback.load_state_dict(state)
