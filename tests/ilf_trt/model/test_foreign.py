"""Folders of strangers: their code never runs, and no weight is made up, left out or misread."""

import json
from pathlib import Path
from typing import Any

import pytest

from ilf_trt.errors import CheckpointError
from ilf_trt.model.foreign import CODE_KEYS, CONFIGS, load_whole, refuse_foreign_code


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("key", CODE_KEYS)
def test_code_of_their_own_is_refused_by_name(name: str, key: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps({key: {"AutoTokenizer": ["evil.Evil", None]}}))
    with pytest.raises(CheckpointError, match=rf"{name} asks to run code of its own \({key}\)"):
        refuse_foreign_code(tmp_path)


def test_quantised_weights_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(CheckpointError, match="quantization_config"):
        refuse_foreign_code(tmp_path)


def test_plain_configs_and_none_pass(tmp_path: Path) -> None:
    refuse_foreign_code(tmp_path / "absent")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 10**30, "auto_map": None}))
    refuse_foreign_code(tmp_path)


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("missing_keys", "lacks"),
        ("unexpected_keys", "does not have"),
        ("mismatched_keys", "in another shape"),
        ("error_msgs", "cannot be read"),
    ],
)
def test_what_a_loader_reports_is_never_passed_over(kind: str, word: str) -> None:
    def load(*, output_loading_info: bool) -> tuple[Any, dict[str, Any]]:
        return object(), {kind: ["block.0.weight"] * output_loading_info}

    with pytest.raises(CheckpointError, match=f"{word}.*block.0.weight"):
        load_whole(load, "here")
