"""The contract: loops and batches from text, and five graphs whose ports fit one another."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from ilf_trt.contract.conditioning import Conditioning
from ilf_trt.contract.graphs import graphs_of
from ilf_trt.contract.ports import COEFFICIENTS, GRAPHS, Graph, Port, Role
from ilf_trt.contract.spec import BatchRange, Loop, ModelSpec, Positions, Precision, Stream
from ilf_trt.errors import IlfError, InvalidRequest

BLOCKS = 6
TEXT_TOKENS = 7
LOOPS = (Loop(2, 3), Loop(0, 3), Loop(2, 5), Loop(0, 5), Loop(0, 0), Loop(5, 5))
RUN_TIME = {
    *("times", "latent", "scales", "history_1", "history_2", "coefficients"),
    *("picture", "conditional", "unconditional", "positions"),
}


def dit(loop: Loop = LOOPS[0], *, guidance: bool = True) -> ModelSpec:
    return ModelSpec(
        kind="dit",
        block_path="transformer_blocks",
        blocks=BLOCKS,
        width=64,
        patch=2,
        latent=(1, 8, 8),
        sizes=((8, 8),),
        positions=Positions(4, 1.0),
        side_streams=(),
        modulation_rows=6,
        head_rows=2,
        loop=loop,
        guidance=guidance,
        shares_modulation=False,
        train_timesteps=1000,
        conditioning=Conditioning.of_labels(10),
        context=(),
        per_block=(),
        constants=(),
        wide_residual=False,
    )


def pixart(loop: Loop = LOOPS[0], *, guidance: bool = True) -> ModelSpec:
    rows = "R" if guidance else "B"
    return replace(
        dit(loop, guidance=guidance),
        kind="pixart",
        latent=(4, 8, 8),
        shares_modulation=True,
        conditioning=Conditioning.of_text(TEXT_TOKENS, 32, sized=False),
        context=(
            Port("text_tokens", (rows, TEXT_TOKENS, 64), "float32", Role.CONTEXT),
            Port("text_bias", (rows, 1, 1, TEXT_TOKENS), "float32", Role.CONTEXT),
        ),
    )


def hoisted(loop: Loop = LOOPS[0], *, guidance: bool = True) -> ModelSpec:
    """A PixArt whose blocks take their text's keys and values ready made."""
    plain = pixart(loop, guidance=guidance)
    return replace(
        plain,
        context=plain.context[1:],
        per_block=(Port("text_pairs", (plain.rows, 2, TEXT_TOKENS, 64), "float32", Role.CONTEXT),),
        constants=(
            Port("feedback.attn2.to_k.weight", (64, 64), "float32", Role.WEIGHT),
            Port("feedback.attn2.to_k.bias", (64,), "float32", Role.WEIGHT),
        ),
    )


SPECS = [
    pytest.param(
        make(loop, guidance=guidance), id=f"{make.__name__}-{loop.begin}:{loop.end}-{'guided' if guidance else 'plain'}"
    )
    for make, loop, guidance in product((dit, pixart, hoisted), LOOPS, (True, False))
]


def names(ports: tuple[Port, ...]) -> list[str]:
    return [port.name for port in ports]


def two_streams(loop: Loop = LOOPS[0], *, guidance: bool = True) -> ModelSpec:
    """A model whose blocks carry the text's tokens with the image's, under 12 modulation rows."""
    plain = dit(loop, guidance=guidance)
    return replace(
        plain,
        shares_modulation=True,
        modulation_rows=12,
        head_rows=1,
        side_streams=(Stream("text", (TEXT_TOKENS,), 32),),
    )


def graph(spec: ModelSpec, name: str, precision: Precision = Precision.FP32) -> Graph:
    return next(graph for graph in graphs_of(spec, precision) if graph.name == name)


# --- graphs


@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize("spec", SPECS)
def test_every_input_is_given_at_run_time_or_made_by_a_graph(spec: ModelSpec, precision: Precision) -> None:
    given = RUN_TIME | set(names((*spec.conditions, *spec.constants)))
    made = {"feedback": Port("feedback", (spec.rows, *spec.grid, spec.width), precision.dtype, Role.FEEDBACK)}
    for each in graphs_of(spec, precision):
        for port in each.inputs:
            if port.name in given:
                assert port.name not in made
                continue
            producer = made[port.name]
            assert producer.dtype == port.dtype, port.name
            assert producer.shape in (port.shape, ("T", *port.shape)), port.name
        made |= {port.name: port for port in each.outputs}
    assert graph(spec, "loop_feedback", precision).outputs == (graph(spec, "loop_body", precision).inputs[1],)


@pytest.mark.parametrize("spec", SPECS)
def test_every_output_of_cond_is_read_by_a_later_graph(spec: ModelSpec) -> None:
    cond, *later = graphs_of(spec, Precision.FP32)
    read = {name for each in later for name in names(each.inputs)}
    assert set(names(cond.outputs)) <= read


@pytest.mark.parametrize("spec", SPECS)
def test_graphs_come_in_order_and_no_port_twice(spec: ModelSpec) -> None:
    graphs = graphs_of(spec, Precision.FP32)
    assert tuple(each.name for each in graphs) == GRAPHS
    for each in graphs:
        ports = names(each.inputs) + names(each.outputs)
        assert len(set(ports)) == len(ports), each.name


@pytest.mark.parametrize("spec", SPECS)
def test_only_what_cond_makes_for_each_time_starts_with_t(spec: ModelSpec) -> None:
    for each in graphs_of(spec, Precision.FP32):
        for port in (*each.inputs, *each.outputs):
            per_time = port.name == "times" or (each.name == "cond" and port.name.startswith("modulation"))
            assert (port.shape[0] == "T") is per_time, (each.name, port.name)


@pytest.mark.parametrize("spec", [dit(), dit(guidance=False), pixart(), pixart(guidance=False)], ids=str)
def test_the_blocks_see_twice_the_rows_under_guidance_and_the_latent_once(spec: ModelSpec) -> None:
    rows = "R" if spec.guidance else "B"
    for each in graphs_of(spec, Precision.FP32):
        for port in (*each.inputs, *each.outputs):
            if port.name in ("hidden", "features", "feedback"):
                assert port.shape == (rows, 4, 4, 64)
            if "latent" in port.name or "history" in port.name or port.name == "prediction":
                assert port.shape == ("B", *spec.latent)


def test_a_dit_has_modulation_rows_for_each_block() -> None:
    shapes = {port.name: port.shape for port in graph(dit(Loop(2, 4)), "cond").outputs}
    assert shapes == {
        "modulation_pre": ("T", "R", 2, 6, 64),
        "modulation_loop_body": ("T", "R", 3, 6, 64),
        "modulation_loop_feedback": ("T", "R", 1, 6, 64),
        "modulation_post": ("T", "R", 1, 6, 64),
        "modulation_head": ("T", "R", 2, 64),
    }


def test_a_pixart_has_one_modulation_row_for_all_blocks() -> None:
    shapes = {port.name: port.shape for port in graph(pixart(), "cond").outputs}
    assert shapes == {
        "modulation": ("T", "R", 1, 6, 64),
        "modulation_head": ("T", "R", 2, 64),
        "text_tokens": ("R", TEXT_TOKENS, 64),
        "text_bias": ("R", 1, 1, TEXT_TOKENS),
    }


def test_hoisted_text_crosses_to_each_graph_for_its_own_blocks() -> None:
    shapes = {port.name: port.shape for port in graph(hoisted(Loop(1, 3)), "cond").outputs}
    assert shapes == {
        "modulation": ("T", "R", 1, 6, 64),
        "modulation_head": ("T", "R", 2, 64),
        "text_pairs_pre": ("R", 1, 2, TEXT_TOKENS, 64),
        "text_pairs_loop_body": ("R", 3, 2, TEXT_TOKENS, 64),
        "text_pairs_loop_feedback": ("R", 1, 2, TEXT_TOKENS, 64),
        "text_pairs_post": ("R", 2, 2, TEXT_TOKENS, 64),
        "text_bias": ("R", 1, 1, TEXT_TOKENS),
    }


def test_a_graph_takes_the_text_of_its_own_blocks_and_no_others() -> None:
    for name in GRAPHS[1:]:
        pairs = [port for port in names(graph(hoisted(Loop(1, 3)), name).inputs) if port.startswith("text_pairs")]
        assert pairs == [f"text_pairs_{name}"]


def test_constants_enter_cond_after_the_conditions_and_no_other_graph() -> None:
    spec = hoisted()
    cond, *later = graphs_of(spec, Precision.FP32)
    assert cond.inputs == (Port("times", ("T",), "float32", Role.TIME), *spec.row_conditions, *spec.constants)
    assert not {name for each in later for name in names(each.inputs)} & set(names(spec.constants))


def test_a_loop_from_the_first_block_leaves_pre_without_conditions() -> None:
    assert names(graph(dit(Loop(0, 3)), "pre").inputs) == ["latent", "picture"]
    assert names(graph(pixart(Loop(0, 3)), "pre").inputs) == ["latent", "picture"]
    assert names(graph(hoisted(Loop(0, 3)), "pre").inputs) == ["latent", "picture"]
    assert "text_pairs_pre" not in names(graph(hoisted(Loop(0, 3)), "cond").outputs)
    assert "modulation_pre" not in names(graph(dit(Loop(0, 3)), "cond").outputs)


def test_a_loop_to_the_last_block_leaves_post_with_the_head_only() -> None:
    rest = [
        "features",
        "modulation_head",
        "conditional",
        "unconditional",
        "latent",
        "history_1",
        "history_2",
        "coefficients",
    ]
    assert names(graph(dit(Loop(2, 5)), "post").inputs) == rest
    assert names(graph(pixart(Loop(2, 5)), "post").inputs) == rest
    assert names(graph(hoisted(Loop(2, 5)), "post").inputs) == rest
    assert "text_pairs_post" not in names(graph(hoisted(Loop(2, 5)), "cond").outputs)
    assert "modulation_post" not in names(graph(dit(Loop(2, 5)), "cond").outputs)


def test_every_stream_passes_through_pre_loop_and_post() -> None:
    spec = two_streams(Loop(1, 4))
    text, start = ("R", TEXT_TOKENS, 32), {port.name: port.shape for port in graph(spec, "cond").outputs}["start_text"]
    assert start == text
    assert {port.name: port.shape for port in graph(spec, "pre").inputs}["start_text"] == text
    assert names(graph(spec, "loop_body").inputs)[:4] == ["hidden", "hidden_text", "feedback", "feedback_text"]
    assert names(graph(spec, "loop_feedback").outputs) == ["feedback", "feedback_text"]
    for name in ("loop_body", "loop_feedback", "post"):
        ports = {port.name: port.shape for port in (*graph(spec, name).inputs, *graph(spec, name).outputs)}
        assert ports["features_text"] == text


def test_modulation_and_head_have_as_many_rows_as_the_model_says() -> None:
    shapes = {port.name: port.shape for port in graph(two_streams(), "cond").outputs}
    assert shapes["modulation"] == ("T", "R", 1, 12, 64)
    assert shapes["modulation_head"] == ("T", "R", 1, 64)


def test_a_loop_has_a_scale_for_each_block() -> None:
    scales = {port.name: port.shape for port in graph(dit(Loop(1, 4)), "loop_body").inputs}["scales"]
    assert scales == (4,)


def test_half_precision_changes_the_tokens_only() -> None:
    for single, half in zip(graphs_of(dit(), Precision.FP32), graphs_of(dit(), Precision.FP16), strict=True):
        for a, b in zip((*single.inputs, *single.outputs), (*half.inputs, *half.outputs), strict=True):
            tokens = a.name in ("hidden", "features", "feedback")
            assert (a.name, a.shape) == (b.name, b.shape)
            assert b.dtype == ("float16" if tokens else a.dtype)


def test_coefficients_are_the_guidance_and_a_row_of_the_solver() -> None:
    ports = {port.name: port for port in graph(dit(), "post").inputs}
    assert ports["coefficients"].shape == (len(COEFFICIENTS),) == (8,)
    assert COEFFICIENTS[0] == "guidance"


def test_a_port_resolves_its_symbols() -> None:
    port = Port("modulation", ("T", "R", 3, 64), "float32", Role.MODULATION)
    assert port.resolve({"T": 5, "R": 4, "B": 2}) == (5, 4, 3, 64)


@pytest.mark.parametrize("precision", Precision)
def test_a_wide_residual_keeps_the_tokens_in_float32(precision: Precision) -> None:
    tokens = {
        port.dtype
        for each in graphs_of(replace(dit(), wide_residual=True), precision)
        for port in (*each.inputs, *each.outputs)
        if port.name in ("hidden", "features", "feedback")
    }
    assert tokens == {"float32"}


# --- precisions


def test_a_coarser_precision_accepts_a_larger_difference() -> None:
    assert list(Precision) == sorted(Precision, key=lambda precision: precision.parity_limit)
    assert Precision.FP32.parity_limit < Precision.FP16.parity_limit < 0.1


@pytest.mark.parametrize(
    ("precision", "dtype", "array_dtype"),
    [
        (Precision.FP32, "float32", "float32"),
        (Precision.FP16, "float16", "float16"),
        (Precision.BF16, "bfloat16", "float32"),
        (Precision.FP8, "float16", "float16"),
    ],
)
def test_a_precision_names_the_dtype_of_its_tokens_and_one_that_numpy_has(
    precision: Precision, dtype: str, array_dtype: str
) -> None:
    assert (precision.dtype, precision.array_dtype) == (dtype, array_dtype)
    np.dtype(precision.array_dtype)


# --- loops


@pytest.mark.parametrize(
    ("text", "loop"), [("8:19", Loop(8, 19)), ("0:0", Loop(0, 0)), (" 1 : 2 ", Loop(1, 2)), ("007:8", Loop(7, 8))]
)
def test_a_loop_is_read_from_text(text: str, loop: Loop) -> None:
    assert Loop.parse(text) == loop


@pytest.mark.parametrize("text", ["", ":", "8", "8:", ":19", "8-19", "8:19:2", "-1:3", "a:b", "1.5:2", "8,19", "²:3"])
def test_text_that_is_no_loop_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="is not BEGIN:END; give two block numbers"):
        Loop.parse(text)


def test_a_loop_counts_both_ends() -> None:
    assert Loop(8, 19).size == 12
    assert Loop(3, 3).size == 1


@pytest.mark.parametrize("loop", LOOPS, ids=str)
def test_a_loop_that_fits_passes(loop: Loop) -> None:
    loop.check(BLOCKS)


@pytest.mark.parametrize("loop", [Loop(3, 2), Loop(0, 6), Loop(6, 6), Loop(-1, 2), Loop(-2, -1)], ids=str)
def test_a_loop_that_does_not_fit_is_refused_with_the_range(loop: Loop) -> None:
    with pytest.raises(InvalidRequest, match="model of 6 blocks; it needs 0 <= begin <= end <= 5"):
        loop.check(BLOCKS)


# --- batches


@pytest.mark.parametrize(
    ("text", "batch"),
    [
        ("1", BatchRange(1, 1, 1)),
        ("12", BatchRange(12, 12, 12)),
        ("1:4:8", BatchRange(1, 4, 8)),
        ("2:2:2", BatchRange(2, 2, 2)),
    ],
)
def test_a_batch_is_read_from_text(text: str, batch: BatchRange) -> None:
    assert BatchRange.parse(text) == batch


@pytest.mark.parametrize("text", ["", ":", "1:2", "1:2:3:4", "a", "1:a:3", "-1", "1.0", "1::3", "1:4:8:"])
def test_text_that_is_no_batch_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="is neither N nor MIN:OPT:MAX"):
        BatchRange.parse(text)


@pytest.mark.parametrize("text", ["0", "0:1:2", "4:1:8", "1:9:8", "8:4:1"])
def test_a_batch_out_of_order_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="out of order; it needs 1 <= MIN <= OPT <= MAX"):
        BatchRange.parse(text)


@pytest.mark.parametrize("text", ["1", "7", "1:4:8"])
def test_a_batch_prints_as_it_is_written(text: str) -> None:
    assert str(BatchRange.parse(text)) == text


def test_a_batch_is_fixed_when_its_ends_meet() -> None:
    assert BatchRange.parse("3").fixed
    assert not BatchRange.parse("1:3:3").fixed


@pytest.mark.parametrize("pictures", [2, 3, 8])
def test_a_number_of_pictures_in_the_range_passes(pictures: int) -> None:
    BatchRange(2, 4, 8).check(pictures)


@pytest.mark.parametrize(("pictures", "hint"), [(1, "1:4:8"), (9, "2:4:9")])
def test_a_number_of_pictures_outside_is_refused_with_a_batch_that_would_do(pictures: int, hint: str) -> None:
    with pytest.raises(InvalidRequest, match=f"batch of {pictures} is outside the bundle's 2:4:8.*--batch {hint}$"):
        BatchRange(2, 4, 8).check(pictures)
    BatchRange.parse(hint).check(pictures)


# --- errors


def test_a_refused_request_is_a_value_error_too() -> None:
    assert issubclass(InvalidRequest, IlfError)
    assert issubclass(InvalidRequest, ValueError)
