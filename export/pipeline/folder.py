"""A diffusers pipeline's folder: which parts it has, and what it says of sizes, texts and classes."""

from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from ilf_trt.contract.class_names import names_of
from ilf_trt.errors import CheckpointError, shown, told
from ilf_trt.files import is_folder
from ilf_trt.model.backbone import PipelineKind
from ilf_trt.model.backbones import pipeline_kinds
from ilf_trt.model.base import SCHEDULER_FILE, read_scheduler_of
from ilf_trt.model.hub_folder import (
    MODEL_INDEX,
    download_advice,
    is_hub_id,
    read_config,
    refuse_remote_code,
)
from ilf_trt.model.pretrained import model_config

WITHOUT_VAE = 8  # pixels to a cell, as diffusers assumes of a PixArt pipeline without VAE
PARTS = ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")
LIBRARIES = ("diffusers", "transformers")
MOST_LEVELS = 8  # of a VAE
VALUE_CHARS, PATH_CHARS = 60, 110
BINNED_CELL = 8  # the tables of sizes are in pixels, of models whose VAE has this factor


@dataclass(frozen=True, slots=True)
class PipelineFolder:
    """What a folder says; `cell` pixels to a side of a latent's cell, `text_tokens` the length of a text.

    `scheduler` and `transformer` are None where the folder has none.
    """

    path: Path
    kind: str
    cell: int
    text_tokens: int | None
    class_names: dict[str, int]
    bins: dict[str, tuple[int, int]]
    has_text: bool
    has_decoder: bool
    scheduler: Path | None
    transformer: Path | None

    @classmethod
    def open(cls, path: str | Path) -> "PipelineFolder":
        """Read `model_index.json` and the configs of the parts.

        Raises CheckpointError for a folder that is no pipeline's, or one of another class.
        """
        name, path = str(path), Path(path)
        if not is_folder(path) and is_hub_id(name):
            raise CheckpointError(f"{name} is not a folder; download it with {download_advice(name)} and give that")
        if not is_folder(path) or not (path / MODEL_INDEX).is_file():
            raise CheckpointError(
                f"{shown(name, PATH_CHARS)} is not a diffusers pipeline: {MODEL_INDEX} is missing; give what "
                "save_pretrained wrote"
            )
        refuse_remote_code(path)
        index = read_config(path / MODEL_INDEX)
        kinds, class_name = pipeline_kinds(), str(index.get("_class_name"))
        if class_name not in kinds:
            raise CheckpointError(
                f"{path} is a {shown(class_name, VALUE_CHARS)}, supported are {', '.join(kinds)}; give that of the "
                "checkpoint's base"
            )
        kind = kinds[class_name]
        parts = {part for part in index if _is_part(index[part])}
        for part in sorted(parts & set(PARTS)):
            _check_part(path / part, index[part])
        has_text = {"text_encoder", "tokenizer"} <= parts
        if "text_encoder" in parts and not has_text:
            raise CheckpointError(f"{path} has a text_encoder and no tokenizer; copy its tokenizer folder there")
        cell = _cell(path, parts)
        side = _config(path, "transformer").get("sample_size") if "transformer" in parts else None
        scheduler = None if read_scheduler_of(path) is None else path / SCHEDULER_FILE
        return cls(
            path=path,
            kind=class_name,
            cell=cell,
            text_tokens=_text_tokens(path, kind.text_tokens, parts),
            class_names=_class_names(path, index.get("id2label")),
            bins=_bins(kind, side) if cell == BINNED_CELL and isinstance(side, int) else {},
            has_text=has_text,
            has_decoder="vae" in parts,
            scheduler=scheduler,
            transformer=path / "transformer" if "transformer" in parts else None,
        )


def _is_part(entry: Any) -> bool:
    """model_index.json names a part by its library and class; [null, null] is a part that is left out."""
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry)


def _check_part(folder: Path, entry: list[str]) -> None:
    """Raises CheckpointError for a part that is missing or of a library that the folder brings itself."""
    if entry[0] not in LIBRARIES:
        raise CheckpointError(
            f"{folder} is a {shown('.'.join(entry), VALUE_CHARS)}: Python code of its own, which is never run; give a "
            f"pipeline of {' and '.join(LIBRARIES)} alone"
        )
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is missing, {MODEL_INDEX} names it; copy the whole pipeline again")


def _bins(kind: PipelineKind, side: int) -> dict[str, tuple[int, int]]:
    table = kind.bins().get(side, {})
    return {ratio: (int(height), int(width)) for ratio, (height, width) in table.items()}


def _config(path: Path, part: str) -> dict[str, Any]:
    return model_config(path / part)


def _cell(path: Path, parts: set[str]) -> int:
    if "vae" in parts:
        config = _config(path, "vae")
        channels = config.get("block_out_channels", config.get("decoder_block_out_channels"))
        if not isinstance(channels, list) or not 1 <= len(channels) <= MOST_LEVELS:
            raise CheckpointError(
                f"{path / 'vae'}: block_out_channels is {told(channels)}, expected 1 to "
                f"{MOST_LEVELS} numbers; restore its config.json"
            )
        return int(2 ** (len(channels) - 1))
    pixels = "transformer" in parts and _config(path, "transformer").get("in_channels") in (1, 3)
    return 1 if pixels else WITHOUT_VAE


def _text_tokens(path: Path, length: int | None, parts: set[str]) -> int | None:
    """The pipeline's own length of a text, or the tokenizer's if that is shorter."""
    config = path / "tokenizer" / "tokenizer_config.json"
    if length is None or "tokenizer" not in parts or not config.is_file():
        return length
    most = read_config(config).get("model_max_length")
    return min(length, int(most)) if isinstance(most, int | float) and 1 <= most < inf else length


def _class_names(path: Path, labels: Any) -> dict[str, int]:
    if labels is None:
        return {}
    if not isinstance(labels, dict) or not all(isinstance(label, str) for label in labels.values()):
        raise CheckpointError(f"{path / MODEL_INDEX}: id2label is no table of numbers and names; restore it")
    return names_of(labels)
