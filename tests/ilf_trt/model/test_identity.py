"""A base that carries an adapter is refused wherever it enters; weights are compared across their roundings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ilf_trt import attach, load_ilf, save_ilf
from ilf_trt.contract.document import read_json
from ilf_trt.errors import CheckpointError, InvalidRequest
from ilf_trt.model.checkpoint import FACTS_FILE, fingerprint, read_checkpoint
from ilf_trt.model.identity import differing_option, differing_weight
from tests.conftest import LOOP, small_dit, small_pixart


class LoraLinear(nn.Module):
    """A Linear as PEFT wraps it: `base_layer`, and two small matrices by the adapter's name."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base_layer.out_features, bias=False)})

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class LoraProcessor(nn.Module):
    """An attention processor with weights, as diffusers had before PEFT."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(4, 4)


def wrap(backbone: Any) -> None:
    attention = backbone.transformer_blocks[1].attn1
    attention.to_q = LoraLinear(attention.to_q)


def mark(backbone: Any) -> None:
    backbone._hf_peft_config_loaded = True


def process(backbone: Any) -> None:
    backbone.transformer_blocks[0].attn1.processor = LoraProcessor()


INJECTIONS = (wrap, mark, process)


@pytest.mark.parametrize("inject", INJECTIONS)
def test_a_base_with_an_adapter_cannot_be_attached_to(inject: Callable[[Any], None]) -> None:
    backbone = small_pixart(sized=False, num_layers=3)
    inject(backbone)
    with pytest.raises(InvalidRequest, match=r"PixArtTransformer2DModel has an adapter .*fuse_lora\(\).*base_differs"):
        attach(backbone, LOOP)


@pytest.mark.parametrize("inject", INJECTIONS)
def test_an_adapter_that_comes_later_is_not_saved(inject: Callable[[Any], None], tmp_path: Path) -> None:
    model = attach(small_dit(num_layers=3), LOOP)
    inject(model.backbone)
    with pytest.raises(InvalidRequest, match="the model's backbone has an adapter"):
        save_ilf(model, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


class Wrapper(nn.Module):
    """Around the whole model, as PEFT's own."""

    def __init__(self, base_model: nn.Module) -> None:
        super().__init__()
        self.base_model, self.peft_config = base_model, {"default": {}}


def test_a_wrapper_of_the_whole_model_is_an_adapter_too() -> None:
    with pytest.raises(InvalidRequest, match="Wrapper has an adapter"):
        attach(Wrapper(small_dit(num_layers=3)), LOOP)


def test_weights_are_the_same_through_a_half_and_not_after_a_step() -> None:
    base, other = small_dit(num_layers=1), small_dit(num_layers=1)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        rounded = small_dit(num_layers=1).to(dtype)
        assert differing_weight(base, rounded) is None
        assert differing_weight(base, rounded.float()) is None  # saved in a half, loaded in float32
    with torch.no_grad():
        other.proj_out_2.bias[3] += 1e-3
    assert differing_weight(base, other) == "proj_out_2.bias"
    assert differing_weight(base, small_dit(num_layers=1, out_channels=1)) == "proj_out_2.weight"
    assert "transformer_blocks.1" in str(differing_weight(base, small_dit(num_layers=2)))


def test_offloaded_weights_cannot_be_compared() -> None:
    with pytest.raises(InvalidRequest, match="are offloaded and cannot be compared"):
        differing_weight(small_dit(num_layers=1), small_dit(num_layers=1).to("meta"))


def test_only_options_that_both_have_can_differ() -> None:
    assert differing_option({"a": 1, "b": 2, "_c": 3}, {"b": 2, "_c": 4, "d": 5}) is None
    assert differing_option({"a": 1, "b": 2}, {"a": 1, "b": 3}) == "b"
    assert differing_option({"b": 2}, {"b": 3}, without={"b"}) is None


# --- a base that differs, as a named choice


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    """A fine-tune of the base of `dit_checkpoint`."""
    backbone = small_dit()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.mul_(1.01)
    backbone.save_pretrained(tmp_path / "tuned")
    return tmp_path / "tuned"


def test_a_fine_tune_is_a_named_choice(dit_checkpoint: Path, tuned: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is another model.*--base-differs for a fine-tune"):
        load_ilf(dit_checkpoint, base=tuned)
    own, other = load_ilf(dit_checkpoint), load_ilf(dit_checkpoint, base=tuned, base_differs=True)
    assert differing_weight(own.backbone, other.backbone) is not None
    assert fingerprint(own.feedback) == fingerprint(other.feedback)
    assert (own.trained_on, other.trained_on) == (None, read_checkpoint(dit_checkpoint).base_sha256)


def test_the_same_base_differs_in_nothing(dit_checkpoint: Path) -> None:
    assert load_ilf(dit_checkpoint, base_differs=True).trained_on is None


def test_another_architecture_is_no_fine_tune(dit_checkpoint: Path, tmp_path: Path) -> None:
    small_dit(num_attention_heads=8, attention_head_dim=8).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="its num_attention_heads is 8"):
        load_ilf(dit_checkpoint, base=tmp_path / "other", base_differs=True)


def test_a_checkpoint_on_a_fine_tune_still_says_what_it_was_trained_on(
    dit_checkpoint: Path, tuned: Path, tmp_path: Path
) -> None:
    save_ilf(load_ilf(dit_checkpoint, base=tuned, base_differs=True), tmp_path / "saved")
    wanted = read_json(dit_checkpoint / FACTS_FILE)["base"]["sha256"]
    assert read_json(tmp_path / "saved" / FACTS_FILE)["base"]["sha256"] == wanted
    with pytest.raises(CheckpointError, match="--base-differs"):
        load_ilf(tmp_path / "saved")
    assert load_ilf(tmp_path / "saved", base_differs=True).trained_on == wanted
