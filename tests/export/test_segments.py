"""The five segments chained in torch beside the model's own forward, guidance and one row of the solver."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ilf_trt import ILFModel, attach
from ilf_trt.contract.graphs import graphs_of
from ilf_trt.contract.ports import GRAPHS
from ilf_trt.contract.spec import ModelSpec, Precision
from ilf_trt.errors import InvalidRequest
from ilf_trt.export.segments import FEEDBACK, Segment, constants_of, segments_of, spec_of
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


def case(kind: str, loop: tuple[int, int], *, guidance: bool, hoist_text: bool = False) -> Case:
    model = attach(BACKBONES[kind](), loop)
    with torch.no_grad():
        model.feedback.scales.copy_(torch.tensor(LARGE_SCALES[: model.loop.size]))
        torch.manual_seed(3)
        for parameter in model.feedback.block.parameters():  # else it is a copy of a loop block, and could be one
            parameter.add_(0.1 * torch.randn_like(parameter))
    spec = spec_of(
        model,
        guidance=guidance,
        text_tokens=TEXT_TOKENS,
        train_timesteps=1000,
        precision=Precision.FP32,
        hoist_text=hoist_text,
    )
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
    pictures = torch.arange(PICTURES, dtype=torch.int32)
    return {
        **{name: torch.randn(shape, generator=generator) for name in ("latent", "history_1", "history_2")},
        "picture": pictures.repeat(2),
        "conditional": pictures,
        "unconditional": pictures + PICTURES,
    }


def run(segment: Segment, tensors: Tensors) -> Tensors:
    outputs = segment(*(tensors[port.name] for port in segment.graph.inputs))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return dict(zip((port.name for port in segment.graph.outputs), outputs, strict=True))


def given_to_cond(model: ILFModel, spec: ModelSpec) -> Tensors:
    return {"times": torch.tensor(TIMES), **rows_of(spec), **constants_of(model, spec)}


def rows_of(spec: ModelSpec) -> Tensors:
    """The conditions by rows, as the graphs take them."""
    asked = {name: value.numpy() for name, value in conditions_of(spec).items()}
    made = spec.conditioning.rows(asked, guided=spec.guidance)
    return {name: torch.from_numpy(value) for name, value in made.items()}


@torch.inference_mode()
def chained(model: ILFModel, spec: ModelSpec, segments: dict[str, Segment], *, feedback: bool) -> Tensors:
    """One step through the five segments, as the architecture draws it."""
    scales = model.feedback.scales
    tables = run(segments["cond"], given_to_cond(model, spec))
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
    got = chained(model, spec, segments, feedback=feedback)
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
    model, spec, segments = case(kind, (1, 2), guidance=True)
    given = given_to_cond(model, spec)
    with torch.inference_mode():
        before = run(segments["cond"], given)
        for name, value in rows_of(spec).items():
            changed = (value + 1) % CLASSES if name == "class_labels" else value.flip(0)
            after = run(segments["cond"], {**given, name: changed})
            assert any(not torch.equal(before[port], after[port]) for port in before), name


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("guidance", [False, True], ids=["unguided", "guided"])
@pytest.mark.parametrize("kind", BACKBONES)
def test_tensors_come_out_in_the_order_shape_and_dtype_of_their_ports(
    kind: str, guidance: bool, loop: tuple[int, int]
) -> None:
    segments = case(kind, loop, guidance=guidance)[2]
    sizes = {"B": PICTURES, "R": 2 * PICTURES, "T": len(TIMES)}
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


def test_cond_holds_every_block_of_the_backbone_for_its_embedders() -> None:
    model, _, segments = case("dit", (1, 2), guidance=True)
    assert list(segments["cond"].blocks) == list(model.adapter.blocks)


@pytest.mark.parametrize(("kind", "port"), [("dit", "modulation"), ("pixart", "text_pairs")])
def test_cond_makes_what_is_the_feedback_blocks_of_the_constants_alone(kind: str, port: str) -> None:
    model, spec, segments = case(kind, (1, 2), guidance=True, hoist_text=kind == "pixart")
    given = {name: value.clone() for name, value in given_to_cond(model, spec).items()}
    with torch.no_grad():
        before = run(segments["cond"], given)
        for parameter in model.feedback.block.parameters():
            parameter.add_(1.0)
        held = run(segments["cond"], given)
        moved = run(segments["cond"], {**given, **{name: 2 * given[name] for name in constants_of(model, spec)}})
    assert {name for name in before if not torch.equal(before[name], held[name])} == set()
    assert {name for name in before if not torch.equal(before[name], moved[name])} == {f"{port}_loop_feedback"}


@pytest.mark.parametrize(
    ("kind", "hoist_text", "begin"),
    [
        ("dit", False, ("norm1.emb.", "norm1.linear.")),
        ("pixart", False, ()),
        ("sized pixart", True, ("attn2.to_k.", "attn2.to_v.")),
    ],
)
def test_constants_are_what_cond_needs_of_the_feedback_block(
    kind: str, hoist_text: bool, begin: tuple[str, ...]
) -> None:
    model, spec, segments = case(kind, (1, 2), guidance=True, hoist_text=hoist_text)
    weights = model.feedback.block.state_dict()
    wanted = {f"{FEEDBACK}.{name}": value for name, value in weights.items() if name.startswith(begin)} if begin else {}
    constants = constants_of(model, spec)
    assert constants.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(constants[name], wanted[name])] == []
    assert wanted.keys() <= {port.name for port in segments["cond"].graph.inputs}


@pytest.mark.parametrize("feedback", [False, True], ids=["plain", "feedback"])
@pytest.mark.parametrize("guidance", [False, True], ids=["unguided", "guided"])
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("kind", ["pixart", "sized pixart"])
def test_a_step_with_text_hoisted_equals_the_model(
    kind: str, loop: tuple[int, int], guidance: bool, feedback: bool
) -> None:
    model, spec, segments = case(kind, loop, guidance=guidance, hoist_text=True)
    got = chained(model, spec, segments, feedback=feedback)
    wanted = in_one_piece(model, spec, feedback=feedback)
    for name in ("next_latent", "prediction"):
        assert relative(got[name], wanted[name]) < FLOAT32_ROUNDING, name


def test_text_cannot_be_hoisted_from_a_model_without_text() -> None:
    with pytest.raises(InvalidRequest, match=r"^DiTTransformer2DModel takes no text; leave --hoist-text out$"):
        case("dit", (1, 2), guidance=True, hoist_text=True)


def test_a_segment_calls_its_modules_as_the_whole_model_does() -> None:
    _, _, segments = case("dit", (1, 2), guidance=True)
    assert segments["pre"].name_in_model("blocks.0.attn1.to_q") == "transformer_blocks.0.attn1.to_q"
    assert segments["loop_body"].name_in_model("blocks.1.ff.net.2") == "transformer_blocks.2.ff.net.2"
    assert segments["loop_feedback"].name_in_model("blocks.0.attn1.to_q") == "feedback.attn1.to_q"
    assert segments["post"].name_in_model("blocks.0.attn1") == "transformer_blocks.3.attn1"
    assert segments["post"].name_in_model("backbone.proj_out_2") == "backbone.proj_out_2"


@pytest.mark.parametrize(("loop", "counts"), [((0, 0), (0, 1, 3)), ((0, LAST), (0, 4, 0)), ((1, 2), (1, 2, 1))])
def test_segments_before_in_and_after_the_loop_hold_its_blocks(
    loop: tuple[int, int], counts: tuple[int, int, int]
) -> None:
    _, _, segments = case("pixart", loop, guidance=False)
    assert tuple(len(segments[name].blocks) for name in ("pre", "loop_body", "post")) == counts
