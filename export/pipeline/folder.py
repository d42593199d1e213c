"""A diffusers pipeline's folder: which parts it has, and what it says of sizes, texts and classes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ilf_trt.contract.class_names import names_of
from ilf_trt.errors import CheckpointError
from ilf_trt.model.backbone import PipelineKind
from ilf_trt.model.backbones import pipeline_kinds
from ilf_trt.model.checkpoint import read_json_object

MODEL_INDEX = "model_index.json"
WITHOUT_VAE = 8  # pixels to a cell, as diffusers assumes of a PixArt pipeline without VAE
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
        path = Path(path)
        index_path = path / MODEL_INDEX
        if not index_path.is_file():
            raise CheckpointError(
                f"{path} is not a diffusers pipeline: {MODEL_INDEX} is missing; give what save_pretrained wrote"
            )
        index = read_json_object(index_path)
        kinds, class_name = pipeline_kinds(), str(index.get("_class_name"))
        if class_name not in kinds:
            raise CheckpointError(
                f"{path} is a {class_name}, supported are {', '.join(kinds)}; give that of the checkpoint's base"
            )
        kind = kinds[class_name]
        parts = {part for part in index if _is_part(index[part])}
        for part in sorted(parts):
            if not (path / part).is_dir():
                raise CheckpointError(
                    f"{path / part} is missing, {MODEL_INDEX} names it; copy the whole pipeline again"
                )
        has_text = {"text_encoder", "tokenizer"} <= parts
        if "text_encoder" in parts and not has_text:
            raise CheckpointError(f"{path} has a text_encoder and no tokenizer; copy its tokenizer folder there")
        cell = _cell(path, parts)
        side = int(_config(path, "transformer").get("sample_size") or 0) if "transformer" in parts else 0
        scheduler = path / "scheduler" / "scheduler_config.json"
        return cls(
            path=path,
            kind=class_name,
            cell=cell,
            text_tokens=_text_tokens(path, kind.text_tokens, parts),
            class_names=names_of(_mapping(index.get("id2label"))),
            bins=_bins(kind, side) if cell == BINNED_CELL else {},
            has_text=has_text,
            has_decoder="vae" in parts,
            scheduler=scheduler if scheduler.is_file() else None,
            transformer=path / "transformer" if "transformer" in parts else None,
        )


def _is_part(entry: Any) -> bool:
    """model_index.json names a part by its library and class; [null, null] is a part that is left out."""
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry)


def _bins(kind: PipelineKind, side: int) -> dict[str, tuple[int, int]]:
    table = kind.bins().get(side, {})
    return {ratio: (int(height), int(width)) for ratio, (height, width) in table.items()}


def _config(path: Path, part: str) -> dict[str, Any]:
    return read_json_object(path / part / "config.json")


def _cell(path: Path, parts: set[str]) -> int:
    if "vae" in parts:
        config = _config(path, "vae")
        channels = config.get("block_out_channels", config.get("decoder_block_out_channels"))
        return int(2 ** (len(channels or ()) - 1))
    pixels = "transformer" in parts and _config(path, "transformer").get("in_channels") in (1, 3)
    return 1 if pixels else WITHOUT_VAE


def _text_tokens(path: Path, length: int | None, parts: set[str]) -> int | None:
    """The pipeline's own length of a text, or the tokenizer's if that is shorter."""
    config = path / "tokenizer" / "tokenizer_config.json"
    if length is None or "tokenizer" not in parts or not config.is_file():
        return length
    most = read_json_object(config).get("model_max_length")
    return min(length, int(most)) if isinstance(most, int) and most > 0 else length


def _mapping(value: Any) -> Mapping[str, str]:
    return value if isinstance(value, Mapping) else {}
