"""The text-to-image demo in the package: whole, small, and different for different prompts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, T5EncoderModel

from ilf_trt import ILFModel, load_ilf
from ilf_trt.contract.packaged import EMOJI, find_packaged
from ilf_trt.contract.plan import make_plan
from ilf_trt.model.checkpoint import read_checkpoint
from ilf_trt.model.sampling import sample

MOST_BYTES = 12_000_000
PROMPTS = ["smiling cat", "green apple"]
STEPS = 4


@pytest.fixture(scope="module")
def model() -> ILFModel:
    return load_ilf("demo-emoji")


def embedded(prompts: list[str]) -> dict[str, torch.Tensor]:
    tokenizer: Any = AutoTokenizer.from_pretrained(EMOJI.folder / "tokenizer")
    encoder = T5EncoderModel.from_pretrained(EMOJI.folder / "text_encoder", dtype=torch.float32)
    length = tokenizer.model_max_length
    conditions = {}
    for prefix, texts in (("", prompts), ("negative_", [""] * len(prompts))):
        given = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            text = encoder(given.input_ids, attention_mask=given.attention_mask).last_hidden_state
        conditions |= {f"{prefix}text": text, f"{prefix}text_mask": given.attention_mask.float()}
    return conditions


def test_it_is_small_and_says_where_its_pictures_are_from() -> None:
    files = [path for path in EMOJI.folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES
    notice = (EMOJI.folder / "NOTICE").read_text()
    assert "Noto Emoji" in notice
    assert "Apache License 2.0" in notice


def test_its_name_stands_for_the_folder_unless_one_lies_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_packaged("demo-emoji") is EMOJI
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo-emoji").mkdir()
    assert find_packaged("demo-emoji") is None


def test_its_base_is_the_one_that_it_was_trained_on(model: ILFModel) -> None:
    checkpoint = read_checkpoint("demo-emoji")
    assert (checkpoint.kind, checkpoint.base) == ("pixart", str(EMOJI.folder / "transformer"))
    assert model.adapter.latent == (3, 32, 32)
    assert any(scale != 0 for scale in model.feedback.scales.tolist())


def test_every_name_is_read_without_unknown_words() -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(EMOJI.folder / "tokenizer")
    for text in ("smiling cat face with heart shaped eyes", "green apple", "crescent moon", "soccer ball"):
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_prompt_gives_its_colours(model: ILFModel) -> None:
    scheduler = read_checkpoint("demo-emoji").scheduler_config()
    plan = make_plan(scheduler, STEPS, blocks=len(model.adapter.blocks), loop=model.loop, feedback="outer:1")
    noise = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(7))
    scale = EMOJI.guidance_scale
    made = sample(model, plan, scheduler, embedded(PROMPTS), noise, guidance_scale=scale)
    assert torch.isfinite(made).all()
    cat, apple = made[..., 8:24, 8:24].mean((2, 3))
    assert apple[1] > apple[0]  # more green than red
    assert cat[0] > cat[2]  # more yellow than blue
