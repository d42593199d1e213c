"""The ONNX files: borders, weights, bytes, and the builds at the edges of what can be asked for."""

import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn

from ilf_trt import load_ilf
from ilf_trt.assembly.conductor import BuildResult, build
from ilf_trt.assembly.options import BuildOptions
from ilf_trt.contract.bundle import Bundle
from ilf_trt.contract.ports import GRAPHS, Graph, Port, Role
from ilf_trt.contract.spec import BatchRange, Precision
from ilf_trt.errors import InvalidRequest, NonFinite, PortMismatch
from ilf_trt.export.graph import OPSET, export_segment
from ilf_trt.export.segments import segments_of, spec_of
from ilf_trt.model.sampling import sample
from ilf_trt.runtime import Pipeline
from tests.conftest import CLASSES, TEXT_CHANNELS, TEXT_TOKENS, small_dit, write_checkpoint

ONNX_TYPES = {"float32": onnx.TensorProto.FLOAT, "float16": onnx.TensorProto.FLOAT16, "int32": onnx.TensorProto.INT32}
BUILDS = ("dit_build", "pixart_build", "whole_loop_build", "half_build")
BLOCKS = 2
# Constants that the exporter folds: a table of sinusoid frequencies, epsilons, scales of attention.
FOLDED_VALUES = 1_000
# Two bytes instead of four, and constants and rows that stay in float32.
HALF_SIZE = 0.6
LARGE = 4e4  # twice it is past float16's largest number, 65504


@pytest.fixture(scope="module")
def half_build(tmp_path_factory: pytest.TempPathFactory) -> BuildResult:
    """FP16, no guidance, a dynamic batch, a loop at the end."""
    folder = tmp_path_factory.mktemp("half")
    checkpoint = write_checkpoint(folder / "checkpoint", small_dit(num_layers=BLOCKS), (BLOCKS - 1, BLOCKS - 1))
    options = BuildOptions(
        precision=Precision.FP16, batch=BatchRange(1, 2, 3), steps=3, feedback="all", guidance=False, guidance_scale=1.0
    )
    return build(str(checkpoint), folder / "half.ilf", options)


@pytest.fixture(params=BUILDS)
def bundle(request: pytest.FixtureRequest) -> Bundle:
    built: BuildResult = request.getfixturevalue(request.param)
    return built.bundle


def onnx_graphs(bundle: Bundle) -> Iterator[tuple[Graph, onnx.ModelProto]]:
    for graph in bundle.manifest.graphs:
        yield graph, onnx.load(bundle.graph(graph.name).path)


def dims_of(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    return tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)


def float_weights(bundle: Bundle) -> list[NDArray[Any]]:
    arrays = [numpy_helper.to_array(tensor) for _, model in onnx_graphs(bundle) for tensor in model.graph.initializer]
    return [array for array in arrays if array.dtype.kind == "f"]


def key(weight: NDArray[Any] | Tensor) -> bytes:
    """Of the values of a weight, in an order that does not change when the exporter transposes it."""
    array = weight.detach().numpy() if isinstance(weight, Tensor) else weight
    return np.sort(array, axis=None).tobytes()


def test_a_bundle_holds_the_five_graphs_of_the_contract(bundle: Bundle) -> None:
    assert tuple(graph.name for graph in bundle.manifest.graphs) == GRAPHS
    assert [model.graph.name for _, model in onnx_graphs(bundle)] == list(GRAPHS)


def test_graphs_are_valid_and_of_the_named_opset(bundle: Bundle) -> None:
    for graph in bundle.manifest.graphs:
        onnx.checker.check_model(bundle.graph(graph.name).path, full_check=True)
        opsets = onnx.load(bundle.graph(graph.name).path, load_external_data=False).opset_import
        assert [(opset.domain, opset.version) for opset in opsets] == [("", OPSET)]


def test_ports_bear_the_names_and_dtypes_of_the_contract_in_its_order(bundle: Bundle) -> None:
    for graph, model in onnx_graphs(bundle):
        for ports, values in ((graph.inputs, model.graph.input), (graph.outputs, model.graph.output)):
            assert [(value.name, value.type.tensor_type.elem_type) for value in values] == [
                (port.name, ONNX_TYPES[port.dtype]) for port in ports
            ]


def test_just_the_symbolic_dims_of_the_contract_vary(bundle: Bundle) -> None:
    pictures = bundle.manifest.batch.max
    fixed = {"B": pictures, "R": 2 * pictures} if bundle.manifest.batch.fixed else {}
    for graph, model in onnx_graphs(bundle):
        symbols: dict[int | str, set[int | str]] = {}
        ports, values = (*graph.inputs, *graph.outputs), (*model.graph.input, *model.graph.output)
        for port, value in zip(ports, values, strict=True):
            for dim, found in zip(port.shape, dims_of(value), strict=True):
                symbols.setdefault(fixed.get(str(dim), dim), set()).add(found)
        for dim, found in symbols.items():
            assert len(found) == 1, f"{graph.name}: {dim} is {found}"
            assert found == {dim} if isinstance(dim, int) else all(isinstance(symbol, str) for symbol in found)
        assert len({next(iter(found)) for found in symbols.values()}) == len(symbols)


def test_no_tensor_is_in_float64(bundle: Bundle) -> None:
    for graph, model in onnx_graphs(bundle):
        typed = [(tensor.name, tensor.data_type) for tensor in model.graph.initializer]
        typed += [(value.name, value.type.tensor_type.elem_type) for value in model.graph.value_info]
        typed += [
            (node.name, attribute.i)
            for node in model.graph.node
            for attribute in node.attribute
            if node.op_type == "Cast" and attribute.name == "to"
        ]
        assert [name for name, kind in typed if kind == onnx.TensorProto.DOUBLE] == [], graph.name


def test_no_local_path_or_stack_trace_is_in_the_bytes(bundle: Bundle) -> None:
    local = [Path.cwd(), Path.home(), sys.prefix, tempfile.gettempdir(), Path(__file__).parents[2]]
    marks = [str(path).encode() for path in local if len(str(path)) > 1]
    marks += [b"site-packages", b".py", b"stack_trace", b'File "', b"pkg.torch"]
    for graph in bundle.manifest.graphs:
        content = bundle.graph(graph.name).path.read_bytes()
        assert [mark for mark in marks if mark in content] == [], graph.name


def test_every_file_is_relative_to_the_bundle(bundle: Bundle) -> None:
    for graph in bundle.manifest.graphs:
        model = onnx.load(bundle.graph(graph.name).path, load_external_data=False)
        places = {e.value for tensor in model.graph.initializer for e in tensor.external_data if e.key == "location"}
        assert places == {f"{graph.name}.onnx.data"}
        assert f"graphs/{graph.name}.onnx.data" in bundle.manifest.files


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dit", "pixart"])
def test_each_weight_is_stored_once_over_all_graphs(kind: str, request: pytest.FixtureRequest) -> None:
    model = load_ilf(request.getfixturevalue(f"{kind}_checkpoint"))
    bundle: Bundle = request.getfixturevalue(f"{kind}_build").bundle
    stored = Counter(key(array) for array in (*float_weights(bundle), *bundle.constants().values()))
    heads: Any = model.adapter.model.config
    scale = np.float32(heads.attention_head_dim**-0.5)
    weights = {
        name: tensor.detach() * (float(scale) if ".to_q." in name else 1)
        for name, tensor in model.named_parameters()
        if name != "feedback.scales"
    }
    wanted = Counter(map(key, weights.values()))
    # A feedback block that is still the copy of a loop block has equal weights, which one graph may store as one.
    assert [name for name, tensor in weights.items() if not 1 <= stored[key(tensor)] <= wanted[key(tensor)]] == []


def test_graphs_hold_no_more_than_the_weights(bundle: Bundle) -> None:
    model = load_ilf(bundle.path.parent / "checkpoint")
    size = sum(p.numel() for p in model.parameters()) + model.adapter.model.pos_embed.pos_embed.numel()
    stored = (*float_weights(bundle), *bundle.constants().values())
    assert sum(array.size for array in stored) <= size + FOLDED_VALUES


@pytest.mark.parametrize("name", ["pre", "post"])
def test_exporting_again_gives_equal_bytes(
    name: str, dit_checkpoint: Path, dit_build: BuildResult, tmp_path: Path
) -> None:
    bundle = dit_build.bundle
    segments = segments_of(load_ilf(dit_checkpoint), bundle.manifest.spec, Precision.FP32)
    path = tmp_path / f"{name}.onnx"
    export_segment(segments[name], bundle.manifest.batch, path)
    for suffix in ("", ".data"):
        before = Path(f"{bundle.graph(name).path}{suffix}")
        assert Path(f"{path}{suffix}").read_bytes() == before.read_bytes(), f"{before.name} differs"


class FixesItsBatch(nn.Module):
    """Gives two rows whatever it gets."""

    graph = Graph("bad", (Port("x", ("B", 3), "float32", Role.TOKENS),), (Port("y", ("B", 3), "float32", Role.TOKENS),))
    spec = SimpleNamespace(patch=2, latent=(1, 8, 8), sizes=((8, 8),), sides=lambda size: {})
    name_in_model = staticmethod(str)

    def forward(self, *tensors: Tensor) -> Tensor:
        return torch.zeros(2, 3) + tensors[0].sum()


def test_a_dimension_that_the_exporter_fixed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PortMismatch, match="bad: y was exported"):
        export_segment(FixesItsBatch(), BatchRange(1, 2, 4), tmp_path / "bad.onnx")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_fixed_batch_leaves_only_the_number_of_times_open(whole_loop_build: BuildResult) -> None:
    for graph, model in onnx_graphs(whole_loop_build.bundle):
        dims = {dim for value in (*model.graph.input, *model.graph.output) for dim in dims_of(value)}
        assert {dim for dim in dims if isinstance(dim, str)} == ({"T"} if graph.name == "cond" else set())


def test_a_graph_without_blocks_takes_no_rows_of_conditions(whole_loop_build: BuildResult) -> None:
    ports = {graph.name: {port.name for port in graph.inputs} for graph in whole_loop_build.bundle.manifest.graphs}
    assert ports["pre"] == {"latent", "picture"}
    assert not {"modulation", "text_tokens", "text_bias"} & ports["post"]
    assert {"modulation", "text_tokens", "text_bias"} <= ports["loop_body"] & ports["loop_feedback"]


@pytest.mark.parametrize("name", BUILDS)
def test_every_difference_is_within_the_limit_of_the_precision(name: str, request: pytest.FixtureRequest) -> None:
    built: BuildResult = request.getfixturevalue(name)
    limit = built.bundle.manifest.precision.parity_limit
    assert built.differences
    assert {row.what: row.relative for row in built.differences if not row.relative <= limit} == {}


def test_a_loop_of_all_blocks_runs_like_the_reference(whole_loop_build: BuildResult) -> None:
    bundle = whole_loop_build.bundle
    rng = np.random.default_rng(5)
    shape = (1, TEXT_TOKENS, TEXT_CHANNELS)
    conditions = {name: rng.standard_normal(shape).astype(np.float32) for name in ("text", "negative_text")}
    conditions |= {f"{name}_mask": np.ones(shape[:2], np.float32) for name in ("text", "negative_text")}
    noise = rng.standard_normal((1, *bundle.manifest.spec.latent)).astype(np.float32)
    with Pipeline.load(bundle.path) as pipeline:
        got = pipeline.generate(latents=noise, guidance_scale=3.0, **conditions).latents
    wanted = sample(
        load_ilf(bundle.path.parent / "checkpoint"),
        bundle.manifest.plan,
        bundle.manifest.scheduler,
        {name: torch.from_numpy(array) for name, array in conditions.items()},
        torch.from_numpy(noise),
        guidance_scale=3.0,
    ).numpy()
    assert np.abs(got - wanted).max() < Precision.FP32.parity_limit * np.abs(wanted).max()


def test_half_precision_is_half_and_not_float32_under_another_name(half_build: BuildResult) -> None:
    weights = float_weights(half_build.bundle)
    size_bytes = sum(array.nbytes for array in weights)
    assert size_bytes < HALF_SIZE * sum(array.size * np.dtype(np.float32).itemsize for array in weights)
    assert max(row.relative for row in half_build.differences) > Precision.FP32.parity_limit


def test_half_precision_keeps_latents_conditions_and_solver_in_float32(half_build: BuildResult) -> None:
    dtypes = {
        port.name: port.dtype
        for graph in half_build.bundle.manifest.graphs
        for port in (*graph.inputs, *graph.outputs)
        if port.dtype != "int32"
    }
    half = {name for name, dtype in dtypes.items() if dtype == "float16"}
    constants = {port.name for port in half_build.bundle.manifest.spec.constants}
    assert half == {"hidden", "features", "feedback", *constants}
    assert {dtype for name, dtype in dtypes.items() if name not in half} == {"float32"}


def test_without_guidance_the_blocks_see_every_picture_once(half_build: BuildResult) -> None:
    graphs = {graph.name: graph for graph in half_build.bundle.manifest.graphs}
    assert graphs["pre"].outputs[0].shape[0] == "B"
    with Pipeline.load(half_build.bundle.path) as pipeline:
        own, off = (pipeline.generate(class_labels=[3, 1, 9], guidance_scale=scale).latents for scale in (None, 0.0))
        with pytest.raises(InvalidRequest, match="guidance_scale is 9, this bundle was built with --no-guidance"):
            pipeline.generate(class_labels=[3, 1, 9], guidance_scale=9.0)
    np.testing.assert_array_equal(own, off)


@pytest.mark.slow
def test_a_residual_that_overflows_float16_is_refused_and_served_when_it_is_kept_in_float32(tmp_path: Path) -> None:
    backbone = small_dit(num_layers=BLOCKS)
    with torch.no_grad():
        for block in backbone.transformer_blocks:
            cast(Any, block).ff.net[2].bias[0] = LARGE
            cast(Any, block).norm1.linear.bias[5 * backbone.inner_dim] = 1.0  # the gate of that channel
    checkpoint = write_checkpoint(tmp_path / "checkpoint", backbone, (0, 0))
    options = BuildOptions(precision=Precision.FP16, batch=BatchRange(1, 1, 1), steps=2, feedback="none")
    with pytest.raises(NonFinite, match=r"gave NaN or infinity.*build with --residual fp32"):
        build(str(checkpoint), tmp_path / "half.ilf", options)
    built = build(str(checkpoint), tmp_path / "wide.ilf", replace(options, wide_residual=True))
    dtypes = {port.name: port.dtype for graph in built.bundle.manifest.graphs for port in graph.outputs}
    assert [dtypes[name] for name in ("hidden", "features", "feedback")] == ["float32"] * 3
    assert HALF_SIZE * sum(array.size * 4 for array in float_weights(built.bundle)) > sum(
        array.nbytes for array in float_weights(built.bundle)
    )
    assert Bundle.open(built.bundle.path).manifest.spec.wide_residual


@pytest.mark.slow
def test_embedders_that_are_equal_copies_are_stored_and_run_once(tmp_path: Path) -> None:
    backbone = small_dit()
    first: Any = backbone.transformer_blocks[0]
    for block in backbone.transformer_blocks:
        block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    checkpoint = write_checkpoint(tmp_path / "checkpoint", backbone)  # the feedback block's embedder is an input
    loaded = load_ilf(checkpoint)
    spec = spec_of(loaded, guidance=True, text_tokens=1, train_timesteps=1000, precision=Precision.FP32)
    export_segment(segments_of(loaded, spec, Precision.FP32)["cond"], BatchRange(1, 4, 16), tmp_path / "cond.onnx")
    model = onnx.load(tmp_path / "cond.onnx")
    tables = [weight for weight in model.graph.initializer if weight.dims[:1] == [CLASSES + 1]]
    assert len(tables) == 1
    assert Counter(node.op_type for node in model.graph.node)["Cos"] == 1
