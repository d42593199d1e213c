"""The shapes that engines are built for, from the contract and the bundle's batch."""

import onnx
import pytest

from ilf_trt.contract import Batch, Graph, Port
from ilf_trt.engines.profiles import MAX_TIMES, profile_of
from tests.engines.conftest import Built

GRAPH = Graph(
    "g",
    (
        Port("latent", ("B", 4, 8, 8), "float32"),
        Port("rows", ("R", 1, 6, 64), "float32"),
        Port("times", ("T",), "float32"),
        Port("scales", (3,), "float32"),
    ),
    (Port("hidden", ("R", 16, 64), "float16"),),
)


def test_a_batch_varies_from_its_least_over_its_best_to_its_most() -> None:
    profile = profile_of(GRAPH, Batch(1, 2, 4), times=10)
    assert profile["latent"] == ((1, 4, 8, 8), (2, 4, 8, 8), (4, 4, 8, 8))
    assert profile["rows"] == ((1, 1, 6, 64), (4, 1, 6, 64), (8, 1, 6, 64))


def test_inputs_of_fixed_shape_have_no_range() -> None:
    assert profile_of(GRAPH, Batch(1, 2, 4), times=10).keys() == {"latent", "rows", "times"}


def test_a_fixed_batch_leaves_the_times_alone_to_vary() -> None:
    assert profile_of(GRAPH, Batch(4, 4, 4), times=10) == {"times": ((1,), (10,), (MAX_TIMES,))}


@pytest.mark.parametrize("times", [1, 20, MAX_TIMES, MAX_TIMES + 7])
def test_the_times_are_tuned_for_the_plan_and_fit_it(times: int) -> None:
    low, best, high = profile_of(GRAPH, Batch(1, 1, 1), times=times)["times"]
    assert (low, best) == ((1,), (times,))
    assert high == (max(times, MAX_TIMES),)


@pytest.mark.parametrize("name", ["dit_fp16", "pixart_fp16"])
def test_every_input_that_varies_has_a_range_of_its_rank(name: str, request: pytest.FixtureRequest) -> None:
    built: Built = request.getfixturevalue(name)
    manifest = built.result.bundle.manifest
    for graph in manifest.graphs:
        profile = profile_of(graph, manifest.batch, times=len(manifest.plan.times))
        model = onnx.load(built.result.bundle.graph_path(graph.name), load_external_data=False)
        varying = {
            value.name: len(value.type.tensor_type.shape.dim)
            for value in model.graph.input
            if any(dim.dim_param for dim in value.type.tensor_type.shape.dim)
        }
        assert {port: len(best) for port, (_, best, _) in profile.items()} == varying
