"""Changes of a checkpoint whose digests fit again, as an attacker can make them."""

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from ilf_trt.contract.stamp import stamped
from ilf_trt.model.checkpoint import FACTS_FILE, WEIGHTS_FILE
from ilf_trt.train.checkpoints import STATE_FILE

Change = Callable[[dict[str, Any]], object]


def change_json(path: Path, change: Change) -> None:
    """Apply `change` to the object in a file, and let all digests beside it fit."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    fit_digests(path.parent)


def change_tensors(path: Path, change: Change) -> None:
    """Apply `change` to the tensors in a file, and let all digests beside it fit."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    fit_digests(path.parent)


def fit_digests(folder: Path) -> None:
    """Write the digests of a folder's files into its `ilf.json` and `state.json`, if it has them."""
    facts, state, weights = (folder / name for name in (FACTS_FILE, STATE_FILE, WEIGHTS_FILE))
    if facts.is_file():
        _stamp(facts, {"block_sha256": _sha256(weights)} if weights.is_file() else {})
    if state.is_file():
        listed = json.loads(state.read_text()).get("files")
        known = listed if isinstance(listed, dict) and all(isinstance(entry, str) for entry in listed.values()) else {}
        fitting = {name: _sha256(folder / name) for name in known if (folder / name).is_file()}
        _stamp(state, {"files": fitting} if known else {})


def _stamp(path: Path, changes: Mapping[str, Any]) -> None:
    data = {**json.loads(path.read_text()), **changes}
    with suppress(ValueError):  # NaN and infinity have no digest, and are refused before it is looked at
        data = stamped(data)
    path.write_text(json.dumps(data))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
