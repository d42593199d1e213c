"""The ILF checkpoint: a folder with `ilf.json` and `ilf.safetensors`, the feedback block and its scales."""

import hashlib
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import torch
from safetensors.torch import save
from torch import Tensor, nn

from ilf_trt.contract.document import Count, DocumentError, as_type, read_json
from ilf_trt.contract.packaged import find_packaged
from ilf_trt.contract.spec import Loop
from ilf_trt.contract.stamp import Sha256, check_stamp, stamped_text
from ilf_trt.errors import CheckpointError, InvalidRequest, told
from ilf_trt.files import is_file, is_folder, whole_file

from .base import BASE_FOLDER, default_scheduler, load_base, read_scheduler_of, stored_scheduler
from .identity import check_plain
from .ilf_model import ILFModel
from .surgery import attach
from .tensor_file import read_tensors, write_tensors
from .weights import check_finite

log = logging.getLogger(__name__)

SCHEMA, UNSTAMPED_SCHEMA = 2, 1
FACTS_FILE = "ilf.json"
WEIGHTS_FILE = "ilf.safetensors"
T = TypeVar("T")
COPY_AGAIN = f"copy it again, with the {FACTS_FILE} beside it"


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """The base as `ilf.json` writes it: where it was, and the sha256 of its weights."""

    source: Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
    sha256: Sha256


@dataclass(frozen=True, slots=True)
class Facts:
    """The content of `ilf.json`; files of schema 1 may lack the digest of the feedback block's file."""

    schema: int
    kind: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    loop: tuple[Count, Count]
    base: BaseFacts
    config: dict[str, Any]
    training: dict[str, Any]
    block_sha256: Sha256 | None = None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What `ilf.json` says; `base` is a folder relative to the checkpoint, a path, or a hub id.

    `block_sha256` is that of the file of the feedback block, None in old checkpoints.
    """

    folder: Path
    kind: str
    base: str
    base_sha256: str
    loop: Loop
    config: dict[str, Any]
    training: dict[str, Any]
    block_sha256: str | None = None

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

    def load(self, *, base_differs: bool = False) -> ILFModel:
        """The model on its base; raises as `load_ilf` does."""
        source = self.base
        backbone = load_base(source, self.kind)
        sha256 = fingerprint(backbone)
        same = sha256 == self.base_sha256
        if not same and not base_differs:
            raise CheckpointError(
                f"base {source} is another model: its weights hash to {sha256[:12]}…, the checkpoint was trained on "
                f"{self.base_sha256[:12]}…; pass the base it was trained on with --base, or --base-differs for a "
                "fine-tune of it"
            )
        config = plain_config(backbone)
        for name, value in self.config.items():
            if name in config and config[name] != value:
                raise CheckpointError(
                    f"base {source} is another model: its {name} is {told(config[name])}, the checkpoint was "
                    f"trained on {told(value)}; pass the base it was trained on with --base"
                )
        try:
            model = attach(backbone, self.loop)
        except InvalidRequest as error:
            raise CheckpointError(f"{self.folder / FACTS_FILE}: {error}") from error
        load_feedback(model, self.folder / WEIGHTS_FILE, sha256=self.block_sha256)
        model.trained_on = None if same else self.base_sha256
        return model


def save_ilf(
    model: ILFModel,
    folder: str | Path,
    *,
    base: str | None = None,
    base_sha256: str | None = None,
    training: dict[str, Any] | None = None,
) -> None:
    """Write the feedback block, the scales and what they belong to, with a digest of each file.

    `base` says where the frozen backbone is found again: a folder relative to `folder`, a path, or a hub id;
    without it the backbone is written beside, as `transformer/`. `base_sha256` is its fingerprint if you know it. For a
    model on another base than its feedback block was trained on, the checkpoint says what it was trained on.
    Raises CheckpointError when a weight is not finite or a fact is no plain data, InvalidRequest when the backbone
    carries an adapter (LoRA), OSError if the disk refuses.
    """
    check_plain(model.backbone, "the model's backbone")
    folder = Path(folder)
    weights = save(_feedback_state(model))
    facts = {
        "schema": SCHEMA,
        "kind": model.adapter.kind,
        "loop": [model.loop.begin, model.loop.end],
        "base": {
            "source": base or BASE_FOLDER,
            "sha256": base_sha256 or model.trained_on or fingerprint(model.backbone),
        },
        "config": plain_config(model.backbone),
        "training": training or {},
        "block_sha256": hashlib.sha256(weights).hexdigest(),
    }
    try:
        as_type(facts, Facts)
        text = stamped_text(facts)
    except DocumentError as error:
        raise CheckpointError(f"{folder / FACTS_FILE} cannot be written: it {error}; give plain finite data") from error
    folder.mkdir(parents=True, exist_ok=True)
    if base is None:
        model.backbone.save_pretrained(folder / BASE_FOLDER)  # type: ignore[operator]
    for name, content in ((WEIGHTS_FILE, weights), (FACTS_FILE, text.encode())):
        with whole_file(folder / name) as draft:
            draft.write_bytes(content)


def load_ilf(folder: str | Path, *, base: str | Path | None = None, base_differs: bool = False) -> ILFModel:
    """Read a checkpoint and its base; `"demo"` and `"demo-emoji"` are in the package, `base` says where the base is.

    `base_differs` takes a base of the same architecture with other weights, such as a fine-tune: its pictures are its
    own, and the feedback block, trained on another, may serve them less well.
    Raises CheckpointError when a file is missing or damaged, a weight is not finite, or the base is another model,
    UnsupportedBackbone for a kind without an adapter.
    """
    checkpoint = read_checkpoint(folder)
    checkpoint = checkpoint if base is None else replace(checkpoint, base=str(base))
    return checkpoint.load(base_differs=base_differs)


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """What `ilf.json` says, checked against its own digest; raises CheckpointError.

    A checkpoint of schema 1 has no such digest; the log says so.
    """
    known = find_packaged(str(folder))
    folder = Path(folder) if known is None else known.folder
    path = folder / FACTS_FILE
    if not is_file(path):
        raise CheckpointError(f"{folder} is not an ILF checkpoint: {FACTS_FILE} is missing; write one with save_ilf")
    facts = _read_facts(path)
    local = folder / facts.base.source
    base = str(local) if is_folder(local) else facts.base.source
    return Checkpoint(
        folder,
        facts.kind,
        base,
        facts.base.sha256,
        Loop(*facts.loop),
        facts.config,
        facts.training,
        facts.block_sha256,
    )


def _read_facts(path: Path) -> Facts:
    try:
        facts = read_stamped(path, Facts, schema=SCHEMA, unstamped=UNSTAMPED_SCHEMA)
    except DocumentError as error:
        raise CheckpointError(f"{path} {error.reason}; copy the checkpoint again") from error
    if facts.schema == UNSTAMPED_SCHEMA:
        log.warning("%s has no digest of its own, so damage may stay unseen; write it again with save_ilf", path)
    elif facts.block_sha256 is None:
        raise CheckpointError(f"{path} lacks block_sha256; copy the checkpoint again")
    return facts


def read_stamped(path: Path, kind: type[T], *, schema: int, unstamped: int) -> T:
    """A document of `schema`, which carries its digest, or of the older schema `unstamped`, which does not.

    Raises CheckpointError for another schema, and DocumentError for one that is damaged.
    """
    data = read_json(path)
    found = data.get("schema")
    if type(found) is not int or found not in (unstamped, schema):
        raise CheckpointError(
            f"{path}: schema {told(found)}, this version reads {unstamped} and {schema}; upgrade ilf-trt"
        )
    return as_type(check_stamp(data) if found == schema else data, kind)


def plain_config(backbone: Any) -> dict[str, Any]:
    """A backbone's own options as JSON keeps them, without diffusers' notes on where they came from."""
    options = {name: value for name, value in dict(backbone.config).items() if not name.startswith("_")}
    plain: dict[str, Any] = json.loads(json.dumps(options, default=str))
    return plain


def fingerprint(module: nn.Module, dtype: torch.dtype = torch.float32) -> str:
    """sha256 over names, shapes and values of the weights, widened to float32 so that a lossless cast keeps it.

    `dtype` float16 or bfloat16 hashes the weights rounded to it.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().to(dtype).contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_feedback(model: ILFModel, path: Path) -> str:
    """Write F and s into one file, and return its sha256.

    Raises CheckpointError when a weight is not finite, OSError if the disk refuses.
    """
    return write_tensors(_feedback_state(model), path)


def _feedback_state(model: ILFModel) -> dict[str, Tensor]:
    """F and s on the CPU, checked; raises CheckpointError when a weight is not finite."""
    state = {name: tensor.detach().contiguous().cpu() for name, tensor in model.feedback.state_dict().items()}
    check_finite(state, "the feedback block")
    return state


def load_feedback(model: ILFModel, path: Path, *, sha256: str | None, advice: str = COPY_AGAIN) -> None:
    """Read F and s from one file, whose digest is `sha256` unless nobody wrote it down.

    Raises CheckpointError when the file is missing, damaged, of another model or not finite.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.feedback.state_dict().items()}
    state = read_tensors(path, wanted, sha256=sha256, advice=advice)
    check_finite(state, str(path))
    model.feedback.load_state_dict(state)
