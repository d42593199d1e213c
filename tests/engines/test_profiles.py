"""The shapes that engines are built for, from the contract and the bundle's batch."""

from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from ilf_trt.contract.ports import Graph, Port, Role
from ilf_trt.contract.spec import BatchRange, DecoderSpec, Precision
from ilf_trt.engines.profiles import MAX_TIMES, profile_of
from tests.engines.conftest import Built

GRAPH = Graph(
    "g",
    (
        Port("latent", ("B", 4, 8, 8), "float32", Role.TOKENS),
        Port("rows", ("R", 1, 6, 64), "float32", Role.TOKENS),
        Port("times", ("T",), "float32", Role.TOKENS),
        Port("scales", (3,), "float32", Role.TOKENS),
    ),
    (Port("hidden", ("R", 16, 64), "float16", Role.TOKENS),),
)


SPEC: Any = SimpleNamespace(patch=2, sizes=((8, 8),), latent=(4, 8, 8), sides=lambda size: {})


def sides(size: tuple[int, int]) -> dict[str, int]:
    return {"H": size[0], "W": size[1]}


SIZES: Any = SimpleNamespace(sizes=((64, 64), (48, 80), (80, 48)), latent=(4, 64, 64), sides=sides)


def test_sides_run_from_the_least_to_the_most_and_are_tuned_for_the_default() -> None:
    graph = Graph("pre", (Port("latent", ("B", 4, "H", "W"), "float32", Role.TOKENS),), ())
    wanted = {"latent": ((1, 4, 48, 48), (2, 4, 64, 64), (4, 4, 80, 80))}
    assert profile_of(graph, BatchRange(1, 2, 4), SIZES, times=10) == wanted


def test_a_tile_may_be_as_small_as_one_cell() -> None:
    decoder = DecoderSpec(4, 8, ("H", "W"), 32, Precision.FP32)
    profile = profile_of(decoder.graph, BatchRange(1, 1, 1), SIZES, times=10, decoder=decoder)
    assert profile == {"latents": ((1, 4, 1, 1), (1, 4, 32, 32), (1, 4, 32, 32))}


def test_a_batch_varies_from_its_least_over_its_best_to_its_most() -> None:
    profile = profile_of(GRAPH, BatchRange(1, 2, 4), SPEC, times=10)
    assert profile["latent"] == ((1, 4, 8, 8), (2, 4, 8, 8), (4, 4, 8, 8))
    assert profile["rows"] == ((1, 1, 6, 64), (4, 1, 6, 64), (8, 1, 6, 64))


def test_inputs_of_fixed_shape_have_no_range() -> None:
    assert profile_of(GRAPH, BatchRange(1, 2, 4), SPEC, times=10).keys() == {"latent", "rows", "times"}


def test_a_fixed_batch_leaves_the_times_alone_to_vary() -> None:
    assert profile_of(GRAPH, BatchRange(4, 4, 4), SPEC, times=10) == {"times": ((1,), (10,), (MAX_TIMES,))}


@pytest.mark.parametrize("times", [1, 20, MAX_TIMES, MAX_TIMES + 7])
def test_the_times_are_tuned_for_the_plan_and_fit_it(times: int) -> None:
    low, best, high = profile_of(GRAPH, BatchRange(1, 1, 1), SPEC, times=times)["times"]
    assert (low, best) == ((1,), (times,))
    assert high == (max(times, MAX_TIMES),)


@pytest.mark.parametrize("name", ["dit_fp16", "pixart_bf16"])
def test_every_input_that_varies_has_a_range_of_its_rank(name: str, request: pytest.FixtureRequest) -> None:
    built: Built = request.getfixturevalue(name)
    manifest = built.result.bundle.manifest
    for graph in manifest.graphs:
        profile = profile_of(graph, manifest.batch, manifest.spec, times=len(manifest.plan.times))
        model = onnx.load(built.result.bundle.graph(graph.name).path, load_external_data=False)
        varying = {
            value.name: len(value.type.tensor_type.shape.dim)
            for value in model.graph.input
            if any(dim.dim_param for dim in value.type.tensor_type.shape.dim)
        }
        assert {port: len(best) for port, (_, best, _) in profile.items()} == varying
