"""Calibration beside a watch on torch's own linear, and what is measured, left out and refused."""

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ilf_trt import ILFModel, attach
from ilf_trt.contract.conditioning import Conditioning
from ilf_trt.contract.plan import StepPlan, make_plan
from ilf_trt.contract.solver import DEFAULT_SCHEDULER
from ilf_trt.contract.spec import Calibrator, ModelSpec, Precision
from ilf_trt.errors import InvalidRequest, MissingDependency
from ilf_trt.export import calibration
from ilf_trt.export.calibration import (
    PICTURES,
    PICTURES_AT_ONCE,
    Calibration,
    _Attentions,
    calibrate,
    calibration_conditions,
    quantizable,
)
from ilf_trt.export.segments import spec_of
from ilf_trt.model import block
from ilf_trt.model.sampling import sample
from tests.conftest import CLASSES, LOOP, TEXT_TOKENS, small_dit, small_pixart
from tests.toys import TOYS, Toy, conditions, registered, toy_model

BLOCKS = 4
STEPS = 3
GUIDANCE_SCALE = 2.0
LINEARS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
TEXT_LINEARS = ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")
PLACES = (*(f"transformer_blocks.{index}" for index in range(BLOCKS)), "feedback")
INSIDE = tuple(f"transformer_blocks.{index}." for index in range(LOOP[0], LOOP[1] + 1))
FF_NET = "transformer_blocks.0.ff.net"
# All pictures at once or a few at a time make the same products in another order; measured below 1e-6.
FLOAT32_ROUNDING = 1e-5


@dataclass(frozen=True)
class Case:
    """A model with large scales, so that a pass with feedback sees other tokens than one without."""

    model: ILFModel
    spec: ModelSpec

    def plan(self, feedback: str, steps: int = STEPS) -> StepPlan:
        return make_plan(DEFAULT_SCHEDULER, steps, blocks=BLOCKS, loop=self.model.loop, feedback=feedback)

    def calibrate(self, feedback: str = "outer:1", *, steps: int = STEPS, **options: Any) -> Calibration:
        conditions = options.pop("conditions", None) or calibration_conditions(self.spec, options.pop("path", None))
        options.setdefault("calibrator", Calibrator.OWN)
        plan = self.plan(feedback, steps)
        return calibrate(
            self.model, plan, DEFAULT_SCHEDULER, self.spec, conditions, guidance_scale=GUIDANCE_SCALE, **options
        )


def case(backbone: Any, *, hoist_text: bool = False, guidance: bool = True) -> Case:
    model = attach(backbone, LOOP)
    torch.manual_seed(1)
    with torch.no_grad():
        model.feedback.scales.copy_(torch.tensor([2.0, -2.0]))
        for parameter in model.feedback.block.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    spec = spec_of(
        model,
        guidance=guidance,
        text_tokens=TEXT_TOKENS,
        train_timesteps=1000,
        precision=Precision.FP8,
        hoist_text=hoist_text,
    )
    return Case(model, spec)


@pytest.fixture(scope="module")
def dit() -> Case:
    return case(small_dit())


@pytest.fixture(scope="module")
def pixart() -> Case:
    return case(small_pixart(sized=True))


def watched(
    case: Case, feedback: str, conditions: Mapping[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> dict[str, float]:
    """The largest magnitude that enters torch's linear with each weight of the model, all pictures at once."""
    names = {
        id(layer.weight): name for name, layer in quantizable(case.model, replace(case.spec, per_block=())).items()
    }
    largest: dict[str, float] = {}
    linear = F.linear

    def watch(given: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if id(weight) in names:
            name = names[id(weight)]
            largest[name] = max(largest.get(name, 0.0), float(given.abs().max()))
        return linear(given, weight, bias)

    pictures = len(next(iter(conditions.values())))
    noise = torch.randn(pictures, *case.spec.latent, generator=torch.Generator().manual_seed(calibration.SEED))
    with monkeypatch.context() as patched:
        patched.setattr(F, "linear", watch)
        sample(
            case.model,
            case.plan(feedback),
            DEFAULT_SCHEDULER,
            conditions,
            noise,
            guidance_scale=GUIDANCE_SCALE,
            guidance=case.spec.guidance,
        )
    return largest


# --- what is measured


@pytest.mark.parametrize("feedback", ["all", "outer:1", "1"])
def test_amax_of_a_dit_is_the_largest_input_over_plain_and_feedback_steps(
    dit: Case, feedback: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = watched(dit, feedback, calibration_conditions(dit.spec, None), monkeypatch)
    assert dit.calibrate(feedback).amax == pytest.approx(wanted, rel=FLOAT32_ROUNDING)


def test_amax_of_a_pixart_is_the_largest_input_over_the_text_of_a_file(
    pixart: Case, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = watched(pixart, "outer:1", calibration_conditions(pixart.spec, text_file), monkeypatch)
    measured = pixart.calibrate(path=text_file)
    assert measured.amax == pytest.approx(wanted, rel=FLOAT32_ROUNDING)
    assert measured.pictures == 3


def test_without_guidance_no_unconditional_row_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = case(small_dit(), guidance=False)
    wanted = watched(plain, "outer:1", calibration_conditions(plain.spec, None), monkeypatch)
    assert plain.calibrate().amax == pytest.approx(wanted, rel=FLOAT32_ROUNDING)


def test_every_picture_counts_however_many_run_at_once(dit: Case) -> None:
    labels = torch.arange(PICTURES_AT_ONCE + 1, dtype=torch.int32)
    few, all_of_them = (dit.calibrate(conditions={"class_labels": labels[:n]}) for n in (PICTURES_AT_ONCE, len(labels)))
    assert (few.pictures, all_of_them.pictures) == (PICTURES_AT_ONCE, PICTURES_AT_ONCE + 1)
    assert few.amax != all_of_them.amax


def test_a_feedback_step_widens_what_the_loops_linears_see_and_leaves_those_before_it(dit: Case) -> None:
    fed = dit.calibrate("all", steps=1).amax
    plain = dit.calibrate("none", steps=1, exclude=("feedback.*",)).amax
    before = {name for name in plain if name.startswith("transformer_blocks.0.")}
    loop = {name for name in plain if name.startswith(INSIDE)}
    assert {name for name in before if fed[name] != plain[name]} == set()
    assert {name for name in loop if fed[name] < plain[name]} == set()
    assert {name for name in loop if fed[name] > plain[name]}


def test_a_calibration_is_the_same_again_whatever_the_seed_of_the_process(dit: Case) -> None:
    torch.manual_seed(99)
    before = torch.get_rng_state()
    first, again = dit.calibrate(), dit.calibrate()
    assert first == again
    assert torch.equal(torch.get_rng_state(), before)


def test_a_calibration_leaves_the_model_as_it_was(dit: Case) -> None:
    weights = {name: value.clone() for name, value in dit.model.state_dict().items()}
    dit.calibrate()
    with pytest.raises(InvalidRequest):
        dit.calibrate("none")
    assert [name for name, value in dit.model.state_dict().items() if not torch.equal(value, weights[name])] == []
    assert [name for name, module in dit.model.named_modules() if module._forward_pre_hooks] == []


# --- attentions


def watched_attentions(case: Case, conditions: Mapping[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The largest magnitudes that enter torch's attention, the query under its scale, all pictures at once."""
    names = {id(module): name for name, module in case.model.backbone.named_modules()}
    names |= {id(module): f"feedback.{name}" for name, module in case.model.feedback.block.named_modules()}
    largest: dict[str, list[float]] = {}
    now = [""]
    attention, product = block.attention, F.scaled_dot_product_attention

    def named(attn: Any, *args: Any) -> Tensor:
        now[0] = names[id(attn)]
        return attention(attn, *args)

    def watch(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        seen = [float(x.abs().max()) for x in (query / query.shape[-1] ** 0.5, key, value)]
        largest[now[0]] = [max(pair) for pair in zip(seen, largest.get(now[0], seen), strict=True)]
        return product(query, key, value, **options)

    pictures = len(next(iter(conditions.values())))
    noise = torch.randn(pictures, *case.spec.latent, generator=torch.Generator().manual_seed(calibration.SEED))
    with monkeypatch.context() as patched:
        patched.setattr(block, "attention", named)
        patched.setattr(F, "scaled_dot_product_attention", watch)
        sample(
            case.model,
            case.plan("outer:1"),
            DEFAULT_SCHEDULER,
            conditions,
            noise,
            guidance_scale=GUIDANCE_SCALE,
            guidance=case.spec.guidance,
        )
    return largest


def ranges(measured: Calibration) -> dict[str, list[float]]:
    return {name: [each.query, each.key, each.value] for name, each in measured.attentions.items()}


def test_ranges_of_a_dits_attentions_are_the_largest_operands(dit: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = watched_attentions(dit, calibration_conditions(dit.spec, None), monkeypatch)
    measured = ranges(dit.calibrate(attention=True))
    assert set(measured) == {f"{place}.attn1" for place in PLACES}
    assert measured == {name: pytest.approx(value, rel=FLOAT32_ROUNDING) for name, value in wanted.items()}


def test_ranges_of_a_pixarts_attentions_are_those_of_image_and_text(
    pixart: Case, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = watched_attentions(pixart, calibration_conditions(pixart.spec, text_file), monkeypatch)
    measured = ranges(pixart.calibrate(path=text_file, attention=True))
    assert set(measured) == {f"{place}.{name}" for place in PLACES for name in ("attn1", "attn2")}
    assert measured == {name: pytest.approx(value, rel=FLOAT32_ROUNDING) for name, value in wanted.items()}


def test_an_attention_to_hoisted_keys_is_not_among_them(text_file: Path) -> None:
    hoisted = case(small_pixart(sized=True), hoist_text=True)
    measured = hoisted.calibrate(path=text_file, attention=True)
    assert set(measured.attentions) == {f"{place}.attn1" for place in PLACES}


def test_attentions_change_nothing_of_the_linears_and_are_left_out_unless_asked_for(dit: Case) -> None:
    with_them, without = dit.calibrate(attention=True), dit.calibrate()
    assert with_them.amax == without.amax
    assert (len(with_them.attentions), without.attentions) == (len(PLACES), {})


def test_an_exclusion_leaves_an_attention_out_and_keeps_its_linears(dit: Case) -> None:
    kept = dit.calibrate(attention=True, exclude=("transformer_blocks.0.attn1",))
    assert set(kept.attentions) == {f"{place}.attn1" for place in PLACES[1:]}
    assert set(kept.amax) == set(quantizable(dit.model, dit.spec))


def test_an_exclusion_of_a_part_that_is_no_attention_is_refused(dit: Case) -> None:
    refused(dit, r"--fp8-exclude 'transformer_blocks.0.ff.net' matches no", attention=True, exclude=("*.to_q", FF_NET))


@pytest.mark.parametrize("adapter", TOYS)
def test_attentions_whose_query_is_a_part_of_a_linears_output_are_not_measured(adapter: type[Toy]) -> None:
    given: list[str] = []
    watch = _Attentions(lambda name, value: given.append(name), "layers")
    model = toy_model(adapter, num_layers=1)
    with registered(adapter), watch, ExitStack() as hooks:
        for name, layer in model.named_modules():
            if isinstance(layer, torch.nn.Linear):
                hooks.callback(layer.register_forward_hook(partial(watch.keep, name)).remove)
        backbone = adapter(model)
        call = backbone.call(
            {n: torch.from_numpy(a) for n, a in conditions(backbone, 1).items() if "negative" not in n}
        )
        model(torch.zeros(1, *backbone.latent), torch.tensor([5.0]), **call)
    assert given == []


# --- which Linears


def test_the_linears_of_a_dit_are_those_of_attention_and_feed_forward(dit: Case) -> None:
    linears = quantizable(dit.model, dit.spec)
    assert set(linears) == {f"{place}.{name}" for place in PLACES for name in LINEARS}
    for name, layer in linears.items():
        root = dit.model if name.startswith("feedback.") else dit.model.backbone
        assert layer is root.get_submodule(name.replace("feedback.", "feedback.block.")), name


def test_the_linears_of_a_pixart_are_those_of_both_attentions_and_feed_forward(pixart: Case) -> None:
    wanted = {f"{place}.{name}" for place in PLACES for name in (*LINEARS, *TEXT_LINEARS)}
    assert set(quantizable(pixart.model, pixart.spec)) == wanted


def test_hoisted_text_projections_are_not_among_them() -> None:
    hoisted = case(small_pixart(sized=False), hoist_text=True)
    left = [name for name in TEXT_LINEARS if name not in ("attn2.to_k", "attn2.to_v")]
    assert set(quantizable(hoisted.model, hoisted.spec)) == {
        f"{place}.{name}" for place in PLACES for name in (*LINEARS, *left)
    }


@pytest.mark.parametrize(
    ("exclude", "gone"),
    [
        (("transformer_blocks.0.*",), {f"transformer_blocks.0.{name}" for name in LINEARS}),
        (("*.to_out.0", "feedback.ff.*"), {f"{place}.attn1.to_out.0" for place in PLACES}),
        (("feedback.attn1.to_q",), {"feedback.attn1.to_q"}),
    ],
    ids=["a block", "patterns", "one"],
)
def test_excluded_linears_are_not_measured(dit: Case, exclude: tuple[str, ...], gone: set[str]) -> None:
    more = {"feedback.ff.net.0.proj", "feedback.ff.net.2"} if "feedback.ff.*" in exclude else set()
    kept = dit.calibrate(exclude=exclude).amax
    assert set(quantizable(dit.model, dit.spec)) - kept.keys() == gone | more


def test_an_exclusion_changes_no_other_linear(dit: Case) -> None:
    whole, kept = dit.calibrate().amax, dit.calibrate(exclude=("feedback.*",)).amax
    assert kept == {name: value for name, value in whole.items() if not name.startswith("feedback.")}


# --- conditions


def spec_of_classes(dit: Case, classes: int) -> ModelSpec:
    return replace(dit.spec, conditioning=Conditioning.of_labels(classes))


@pytest.mark.parametrize("classes", [1, 2, CLASSES, PICTURES, 1000])
def test_labels_are_spread_over_all_classes_and_leave_the_null_class_out(dit: Case, classes: int) -> None:
    labels = calibration_conditions(spec_of_classes(dit, classes), None)["class_labels"]
    assert labels.dtype == torch.int32
    assert len(set(labels.tolist())) == len(labels) == min(PICTURES, classes)
    assert (labels[0], labels[-1]) == (0, classes - 1)
    gaps = labels.diff()
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def test_text_needs_a_file_to_calibrate_on(pixart: Case) -> None:
    with pytest.raises(InvalidRequest, match=r"pass --calibration FILE\.npz with text, text_mask, negative_text, "):
        calibration_conditions(pixart.spec, None)


def test_text_of_a_file_is_padded_under_its_mask(pixart: Case, text_file: Path, tmp_path: Path) -> None:
    with np.load(text_file) as file:
        short = {name: array[:, :3] if "text" in name else array for name, array in file.items()}
    np.savez(tmp_path / "short.npz", **short)
    conditions = calibration_conditions(pixart.spec, tmp_path / "short.npz")
    assert {name: tuple(value.shape) for name, value in conditions.items()} == {
        port.name: port.resolve({"B": 3}) for port in pixart.spec.conditions
    }
    assert conditions["text_mask"].tolist() == [[1.0] * 3 + [0.0] * (TEXT_TOKENS - 3)] * 3


def test_labels_of_a_file_replace_the_spread_ones(dit: Case, tmp_path: Path) -> None:
    np.savez(tmp_path / "labels.npz", class_labels=np.array([7, 7, 1]))
    conditions = calibration_conditions(dit.spec, tmp_path / "labels.npz")
    assert conditions["class_labels"].tolist() == [7, 7, 1]


def test_a_file_of_other_conditions_is_refused(dit: Case, text_file: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"is not a condition of this bundle; it takes class_labels"):
        calibration_conditions(dit.spec, text_file)


# --- refusals


def refused(case: Case, match: str, **options: Any) -> None:
    with pytest.raises(InvalidRequest, match=match) as caught:
        case.calibrate(**options)
    assert "\n" not in str(caught.value)


def test_a_plan_without_feedback_leaves_the_feedback_block_unseen(dit: Case) -> None:
    refused(dit, r"^feedback\.\S+ never ran during calibration: .* pass --feedback outer:1", feedback="none")


@pytest.mark.parametrize("pattern", ["blocks.9.*", "transformer_blocks.0", "", "*.TO_Q"])
def test_a_pattern_that_matches_no_linear_is_refused_with_a_name_that_exists(dit: Case, pattern: str) -> None:
    refused(dit, r"matches no Linear; they are named as transformer_blocks\.0\.attn1\.to_q", exclude=("*q", pattern))


@pytest.mark.parametrize("exclude", [("*",), ("transformer_blocks.*", "feedback.*")])
def test_an_exclusion_of_everything_is_refused(dit: Case, exclude: tuple[str, ...]) -> None:
    refused(dit, "leaves no Linear to quantise; build with --precision fp16", exclude=exclude)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_refused(dit: Case) -> None:
    refused(dit, "device 'cuda' cannot be used .* pass --device cpu", device="cuda")
    assert {parameter.device.type for parameter in dit.model.parameters()} == {"cpu"}


# --- Model Optimizer


def test_model_optimizer_that_is_not_there_is_refused_by_name(dit: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelopt", None)
    with pytest.raises(MissingDependency, match="pip install nvidia-modelopt, or pass --calibrator own") as caught:
        dit.calibrate(calibrator=Calibrator.MODELOPT)
    assert "\n" not in str(caught.value)


def test_without_model_optimizer_auto_is_the_own_collector(dit: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "find_spec", lambda name: None)
    assert dit.calibrate(calibrator=Calibrator.AUTO) == dit.calibrate(calibrator=Calibrator.OWN)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what Model Optimizer imports
def test_model_optimizer_measures_what_the_own_collector_does(dit: Case) -> None:
    pytest.importorskip("modelopt")
    measured = dit.calibrate(calibrator=Calibrator.AUTO)
    assert measured.calibrator is Calibrator.MODELOPT
    assert measured.amax == dit.calibrate(calibrator=Calibrator.OWN).amax
    assert [name for name, module in dit.model.named_modules() if module._forward_pre_hooks] == []
    with pytest.raises(InvalidRequest, match="never ran during calibration"):
        dit.calibrate("none", calibrator=Calibrator.MODELOPT)
