"""T5 encoders and tokenizers of transformers, from their folders."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ilf_trt.contract.document import DocumentError
from ilf_trt.contract.tokenizer_file import check_tokenizer_folder
from ilf_trt.errors import CheckpointError, MissingDependency

from .foreign import foreign
from .hub_folder import refuse_remote_code
from .pretrained import model_config, refuse_gaps, wanted_shapes
from .weights import Weights

TRANSFORMERS = "model"
TOKENIZER_FILES = ("tokenizer*.json", "spiece.model", "special_tokens_map.json", "added_tokens.json")
EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")
"""One tensor under either name, or under both: T5 ties them."""
UNUSED = re.compile(r"decoder\.|lm_head\.")
"""The other half of a whole T5, which no encoder reads."""
FEWEST_PIECES = 2  # without a tokenizer's files, transformers makes a tokenizer of a single piece
ROWS = 1 << 12


def t5_weights(folder: Path) -> Weights:
    """The weights of a T5 encoder: exactly those that its config.json asks for, none of them quantised.

    A whole T5 serves too; its decoder is left out. Raises CheckpointError, MissingDependency.
    """
    transformers = _transformers()
    config = model_config(folder)
    if config.get("model_type") != "t5":
        raise CheckpointError(f"{folder} is a {config.get('model_type')!r} text encoder, supported is 't5'")
    whole = Weights.of(folder, TRANSFORMERS)
    weights = replace(whole, tensors={name: t for name, t in whole.tensors.items() if not UNUSED.match(name)})
    wanted = wanted_shapes(
        lambda: transformers.T5EncoderModel(transformers.T5Config.from_dict(config)), folder, len(weights.tensors)
    )
    known = weights.tensors.keys() & set(EMBEDDINGS)
    for name in set(EMBEDDINGS) - known if known else ():
        wanted.pop(name, None)
    weights.check(wanted)
    if len(known) > 1 and not _equal(weights):
        raise CheckpointError(f"{folder}: {' and '.join(EMBEDDINGS)} differ, T5 has one embedding; remove one")
    return weights


def load_t5(folder: Path, dtype: torch.dtype) -> Any:
    """transformers' own T5EncoderModel; raises as `t5_weights`."""
    weights = t5_weights(folder)
    transformers = _transformers()
    with foreign(f"{folder} cannot be loaded as T5EncoderModel", "copy the folder again"), _no_bar(transformers):
        model, info = transformers.T5EncoderModel.from_pretrained(
            folder,
            use_safetensors=True,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            variant=weights.variant,
            output_loading_info=True,
        )
    refuse_gaps(info, folder, lambda name: UNUSED.match(name) is not None)
    return model


def load_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer of a folder; raises CheckpointError for one without words, MissingDependency."""
    transformers = _transformers()
    refuse_remote_code(folder)
    try:
        check_tokenizer_folder(folder)
    except DocumentError as error:
        raise CheckpointError(f"{error}; a T5's tokenizer is read, copy that of the text encoder") from error
    with foreign(f"{folder} holds no tokenizer that can be read", "copy its tokenizer.json or spiece.model there"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if len(tokenizer.get_vocab()) - len(tokenizer.get_added_vocab()) < FEWEST_PIECES:
            raise ValueError("it has no words")
    return tokenizer


@contextmanager
def _no_bar(transformers: Any) -> Iterator[None]:
    bars = transformers.utils.logging
    before = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            bars.enable_progress_bar()


def _equal(weights: Weights) -> bool:
    """Whether both names of the embedding hold the same numbers, a part of them at a time."""
    first, second = (weights.tensors[name] for name in EMBEDDINGS)
    with (
        foreign(f"{weights.folder} cannot be read", "copy it again"),
        safe_open(first.file, framework="pt") as one,
        safe_open(second.file, framework="pt") as other,
    ):
        slices = [file.get_slice(name) for file, name in zip((one, other), EMBEDDINGS, strict=True)]
        return all(torch.equal(*(part[row : row + ROWS] for part in slices)) for row in range(0, first.shape[0], ROWS))


def _transformers() -> Any:
    try:
        import transformers
        from transformers import T5EncoderModel  # noqa: F401
    except ImportError as error:
        raise MissingDependency(f"a text encoder needs {error.name}; pip install 'ilf-trt[pipeline]'") from error
    return transformers
