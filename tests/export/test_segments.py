"""The five segments chained in torch beside the model's own forward, guidance and one row of the solver."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ilf_trt import ILFModel, attach
from ilf_trt.contract import GRAPHS, ModelSpec, Precision, graphs_of
from ilf_trt.export.segments import Segment, segments_of, spec_of
from tests.conftest import BLOCKS, CLASSES, TEXT_CHANNELS, TEXT_TOKENS, small_dit, small_pixart

Tensors = dict[str, Tensor]
Case = tuple[ILFModel, ModelSpec, dict[str, Segment]]

PICTURES = 2
TIME, TIME_POST, OTHER_TIME = 700.0, 433.0, 12.0
TIMES = (TIME, OTHER_TIME, TIME_POST)
LAST = BLOCKS - 1
LOOPS = ((0, 0), (0, LAST), (LAST, LAST), (1, 2))
# Far from the trained sizes of a scale, so that a wrong index, order or sign moves the output well past rounding.
LARGE_SCALES = (0.9, -0.7, 0.5, -0.3)
GUIDANCE_SCALE = 2.5
# Every number differs and none is 0 or 1, so that no two columns can be swapped unseen.
SOLVER_ROW = (1.3, -0.4, 0.8, 0.6, -0.25, 0.15)
# Segments and model make the same products in the same order up to a concatenation; measured below 1e-6.
FLOAT32_ROUNDING = 1e-5
# A change that matters is thousands of times larger than rounding.
VISIBLE = 1e-2

BACKBONES: dict[str, Callable[[], Any]] = {
    "dit": small_dit,
    "pixart": lambda: small_pixart(sized=False),
    "sized pixart": lambda: small_pixart(sized=True),
}


def case(kind: str, loop: tuple[int, int], *, guidance: bool) -> Case:
    model = attach(BACKBONES[kind](), loop)
    with torch.no_grad():
        model.feedback.scales.copy_(torch.tensor(LARGE_SCALES[: model.loop.size]))
        torch.manual_seed(3)
        for parameter in model.feedback.block.parameters():  # else it is a copy of a loop block, and could be one
            parameter.add_(0.1 * torch.randn_like(parameter))
    spec = spec_of(model, guidance=guidance, text_tokens=TEXT_TOKENS, train_timesteps=1000, precision=Precision.FP32)
    return model, spec, segments_of(model, spec, Precision.FP32)


def conditions_of(spec: ModelSpec) -> Tensors:
    """Conditions in which no two pictures, and no two ports, are alike."""
    generator = torch.Generator().manual_seed(2)
    values = {
        "class_labels": torch.tensor([3, 0], dtype=torch.int32),
        "text": torch.randn(PICTURES, TEXT_TOKENS, TEXT_CHANNELS, generator=generator),
        "text_mask": (torch.arange(TEXT_TOKENS) < torch.tensor([[TEXT_TOKENS], [4]])).float(),
        "negative_text": torch.randn(PICTURES, TEXT_TOKENS, TEXT_CHANNELS, generator=generator),
        "negative_text_mask": (torch.arange(TEXT_TOKENS) < torch.tensor([[1], [3]])).float(),
        "resolution": torch.tensor([[128.0, 64.0], [512.0, 256.0]]),
        "aspect_ratio": torch.tensor([[0.5], [1.7]]),
    }
    return {port.name: values[port.name] for port in spec.conditions}


def state(spec: ModelSpec) -> Tensors:
    """The latent and its history."""
    generator = torch.Generator().manual_seed(1)
    shape = (PICTURES, *spec.latent)
    return {name: torch.randn(shape, generator=generator) for name in ("latent", "history_1", "history_2")}


def run(segment: Segment, tensors: Tensors) -> Tensors:
    outputs = segment(*(tensors[port.name] for port in segment.graph.inputs))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return dict(zip((port.name for port in segment.graph.outputs), outputs, strict=True))


@torch.inference_mode()
def chained(segments: dict[str, Segment], spec: ModelSpec, scales: Tensor, *, feedback: bool) -> Tensors:
    """One step through the five segments, as the architecture draws it."""
    tables = run(segments["cond"], {"times": torch.tensor(TIMES), **conditions_of(spec)})
    varying = {port.name for port in segments["cond"].graph.outputs if port.shape[0] == "T"}
    at_t, at_t_post = (
        {name: table[TIMES.index(time)] if name in varying else table for name, table in tables.items()}
        for time in (TIME, TIME_POST)
    )
    tensors = {**state(spec), "coefficients": torch.tensor([GUIDANCE_SCALE, *SOLVER_ROW, 0.0])}
    tensors |= run(segments["pre"], {**tensors, **at_t})
    no_feedback = torch.zeros_like(tensors["hidden"])
    tensors |= run(segments["loop_body"], {**tensors, **at_t, "feedback": no_feedback, "scales": 0 * scales})
    if feedback:
        tensors |= run(segments["loop_feedback"], {**tensors, **at_t})
        tensors |= run(segments["loop_body"], {**tensors, **at_t_post, "scales": scales})
    return run(segments["post"], {**tensors, **(at_t_post if feedback else at_t)})


@torch.inference_mode()
def in_one_piece(model: ILFModel, spec: ModelSpec, *, feedback: bool) -> Tensors:
    """The same step by the model's own forward, guidance as in its paper, and the solver's two formulas."""
    given = state(spec)
    x = given["latent"]
    call = model.adapter.call(conditions_of(spec), guidance=spec.guidance)
    rows = torch.cat([x, x]) if spec.guidance else x
    output = model(rows, timestep=TIME, t_post=TIME_POST, feedback=feedback, **call).sample[:, : spec.latent[0]]
    if spec.guidance:
        conditional, unconditional = output[:PICTURES], output[PICTURES:]
        output = unconditional + GUIDANCE_SCALE * (conditional - unconditional)
    c_x, c_out, a, b_0, b_1, b_2 = SOLVER_ROW
    prediction = c_x * x + c_out * output
    following = a * x + b_0 * prediction + b_1 * given["history_1"] + b_2 * given["history_2"]
    return {"next_latent": following, "prediction": prediction}


def relative(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    return float((got - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("feedback", [False, True], ids=["plain", "feedback"])
@pytest.mark.parametrize("guidance", [False, True], ids=["unguided", "guided"])
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("kind", BACKBONES)
def test_a_step_through_the_segments_equals_the_model(
    kind: str, loop: tuple[int, int], guidance: bool, feedback: bool
) -> None:
    model, spec, segments = case(kind, loop, guidance=guidance)
    got = chained(segments, spec, model.feedback.scales, feedback=feedback)
    wanted = in_one_piece(model, spec, feedback=feedback)
    for name in ("next_latent", "prediction"):
        assert relative(got[name], wanted[name]) < FLOAT32_ROUNDING, name


@pytest.mark.parametrize("kind", BACKBONES)
def test_feedback_moves_the_step(kind: str) -> None:
    model, spec, _ = case(kind, (1, 2), guidance=True)
    plain, fed = (in_one_piece(model, spec, feedback=feedback)["prediction"] for feedback in (False, True))
    assert relative(fed, plain) > VISIBLE


@pytest.mark.parametrize("kind", BACKBONES)
def test_every_condition_moves_the_step(kind: str) -> None:
    _, spec, segments = case(kind, (1, 2), guidance=True)
    conditions = conditions_of(spec)
    with torch.inference_mode():
        before = run(segments["cond"], {"times": torch.tensor(TIMES), **conditions})
        for name, value in conditions.items():
            changed = (value + 1) % CLASSES if name == "class_labels" else value.flip(0)
            after = run(segments["cond"], {"times": torch.tensor(TIMES), **conditions, name: changed})
            assert any(not torch.equal(before[port], after[port]) for port in before), name


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("guidance", [False, True], ids=["unguided", "guided"])
@pytest.mark.parametrize("kind", BACKBONES)
def test_tensors_come_out_in_the_order_shape_and_dtype_of_their_ports(
    kind: str, guidance: bool, loop: tuple[int, int]
) -> None:
    segments = case(kind, loop, guidance=guidance)[2]
    sizes = {"B": PICTURES, "2B": 2 * PICTURES, "T": len(TIMES)}
    with torch.inference_mode():
        for segment in segments.values():
            inputs = {
                port.name: torch.ones(port.resolve(sizes), dtype=getattr(torch, port.dtype))
                for port in segment.graph.inputs
            }
            outputs = run(segment, inputs)
            assert {name: (tuple(tensor.shape), str(tensor.dtype)) for name, tensor in outputs.items()} == {
                port.name: (port.resolve(sizes), f"torch.{port.dtype}") for port in segment.graph.outputs
            }


@pytest.mark.parametrize("kind", BACKBONES)
def test_segments_bear_the_borders_of_the_contract_in_its_order(kind: str) -> None:
    _, spec, segments = case(kind, (1, 2), guidance=True)
    assert tuple(segments) == GRAPHS
    assert tuple(segment.graph for segment in segments.values()) == graphs_of(spec, Precision.FP32)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("kind", BACKBONES)
def test_every_block_weight_is_held_by_one_segment_beside_cond(kind: str, loop: tuple[int, int]) -> None:
    model, _, segments = case(kind, loop, guidance=True)
    held = Counter(
        id(parameter)
        for name, segment in segments.items()
        if name != "cond"
        for parameter in segment.blocks.parameters()
    )
    weights = [*model.adapter.blocks.parameters(), *model.feedback.block.parameters()]
    assert held == Counter(dict.fromkeys(map(id, weights), 1))


def test_cond_holds_every_block_for_its_embedders() -> None:
    model, _, segments = case("dit", (1, 2), guidance=True)
    assert list(segments["cond"].blocks) == [*model.adapter.blocks, model.feedback.block]


@pytest.mark.parametrize(("loop", "counts"), [((0, 0), (0, 1, 3)), ((0, LAST), (0, 4, 0)), ((1, 2), (1, 2, 1))])
def test_segments_before_in_and_after_the_loop_hold_its_blocks(
    loop: tuple[int, int], counts: tuple[int, int, int]
) -> None:
    _, _, segments = case("pixart", loop, guidance=False)
    assert tuple(len(segments[name].blocks) for name in ("pre", "loop_body", "post")) == counts
