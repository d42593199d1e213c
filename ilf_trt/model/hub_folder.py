"""Folders as diffusers, transformers and the hub have them: found, read strictly, and never run."""

import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ilf_trt.contract.document import DocumentError, read_json
from ilf_trt.errors import CheckpointError, shown
from ilf_trt.files import is_folder

from .foreign import foreign

CONFIG, MODEL_INDEX = "config.json", "model_index.json"
CONFIGS = (
    CONFIG,
    MODEL_INDEX,
    "tokenizer_config.json",
    "scheduler_config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)
CODE = ("auto_map", "custom_code", "custom_pipelines", "trust_remote_code")
"""The keys by which a config names Python code that lies beside it, or allows it."""
ADAPTER = "adapter_config.json"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
NAME_CHARS = 100


def is_hub_id(source: str) -> bool:
    """Whether a name reads as `owner/name` of the hub."""
    return HUB_ID.fullmatch(source) is not None


def download_advice(hub_id: str) -> str:
    return f"hf download {hub_id} --local-dir {shlex.quote(hub_id.partition('/')[2])}"


def local_folder(what: str, source: str, files: Iterable[str], advice: str) -> Path:
    """A folder as it is; a hub id as its snapshot on this disk, with the `files` (patterns) that it needs of it.

    Without a network, or with HF_HUB_OFFLINE=1, that is the snapshot of an earlier download. Raises CheckpointError.
    """
    if is_folder(source):
        return Path(source)
    name = shown(source, NAME_CHARS)
    if not is_hub_id(source):
        raise CheckpointError(f"{what} {name} is not a folder; {advice}")
    with foreign(f"{what} {name} is no folder here, and nothing of the hub", advice):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(source, allow_patterns=list(files)))


def read_config(path: Path) -> dict[str, Any]:
    """A config of diffusers or transformers, strictly; raises CheckpointError."""
    try:
        return read_json(path, foreign=True)
    except DocumentError as error:
        raise CheckpointError(f"{error}; restore the file") from error


def refuse_remote_code(folder: Path) -> None:
    """Refuse what a library would run or apply unasked, or would wait for.

    That is a config that names Python code of its own, a LoRA beside the weights, a pipe or a device, a link to
    nothing. Raises CheckpointError.
    """
    with foreign(f"{folder} cannot be read", "check its owner and its mode"):
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        irregular = [entry.name for entry in entries if not entry.is_file() and not entry.is_dir()]
        names = {entry.name for entry in entries}
    if irregular:
        raise CheckpointError(
            f"{folder / irregular[0]} is no regular file, or a link to nothing; copy the whole folder again"
        )
    if ADAPTER in names:
        raise CheckpointError(
            f"{folder} holds {ADAPTER}: a LoRA beside the weights is not applied; merge it into them, or remove it"
        )
    for name in CONFIGS:
        config = read_config(folder / name) if name in names else {}
        for key in CODE:
            if config.get(key):
                raise CheckpointError(
                    f"{folder / name} has {key}: it names Python code of its own, which is never run; "
                    "give a folder without it"
                )
