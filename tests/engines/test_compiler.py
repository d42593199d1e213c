"""A bundle's engines: what they hold, what the manifest says of them, and what the build cache saves."""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from torch import nn

from ilf_trt import load_ilf
from ilf_trt.assembly.conductor import BuildResult, build, compile_bundle
from ilf_trt.contract.bundle import Bundle
from ilf_trt.contract.manifest import AttentionAmax
from ilf_trt.contract.ports import GRAPHS
from ilf_trt.contract.spec import Precision
from ilf_trt.contract.target import Architecture, EngineOptions, Library
from ilf_trt.engines.compiler import Compiler, read_report
from ilf_trt.engines.library import LibraryFacts
from ilf_trt.engines.report import EngineReport
from ilf_trt.errors import BundleError, InvalidRequest
from tests.engines.conftest import ADA, BLACKWELL, LOOP, RTX, Built, Worker, retrained

BUILDS = ("dit_fp16", "dit_fp8", "pixart_bf16")
GRAPHS_KEPT, ENGINES_KEPT = (
    tuple(f"{what} {name}" for name in GRAPHS if name != "loop_feedback") for what in ("graph", "engine")
)
ENGINES = tuple(f"engine {name}" for name in GRAPHS)
ATTENTIONS = {"dit": 1, "pixart": 2}  # of a block: of the tokens, and of the text
# Scales of products, epsilons, and zeros that widen heads of 18 to what attention takes.
ADDED_BYTES = 8192
LESS, MORE = 0.95, 1.05  # shapes are folded away, and padding is added
# Sums, norms and modulations stay in float32: a row of a table, six times the width.
LARGEST_FP32_BYTES = 2048

CONSTANT = re.compile(
    rb"const_payload_size=(?P<size>\d+) .*? (?P<place>offset=\d+ .*?region=\S+) .*? type=(?P<type>\w+) \}"
)


@pytest.fixture(params=BUILDS)
def built(request: pytest.FixtureRequest) -> Built:
    return request.getfixturevalue(request.param)


def blocks_of(graph: str, blocks: int) -> int:
    """Blocks that a graph holds, in a model with the tests' loop."""
    begin, end = LOOP
    return {"cond": 0, "pre": begin, "loop_body": end - begin + 1, "loop_feedback": 1, "post": blocks - 1 - end}[graph]


def linears_of(built: Built) -> set[str]:
    """Names of the Linears that run in a block at every pass."""
    model = load_ilf(built.checkpoint)
    named = {f"transformer_blocks.{index}": block for index, block in enumerate(model.adapter.blocks)}
    return {
        f"{place}.{name}"
        for place, block in {**named, "feedback": model.feedback.block}.items()
        for name, layer in block.named_modules()
        if isinstance(layer, nn.Linear) and name.split(".")[0] in ("attn1", "attn2", "ff")
    }


def precisions(reports: list[EngineReport]) -> dict[str, str]:
    """The precision of the product of every layer, by the layer's name in the graph."""
    return {
        layer: kernel.precision
        for report in reports
        for kernel in report.kernels
        if kernel.kind == "matmul"
        for layer in kernel.layers
    }


def weight_bytes(bundle: Bundle, graph: str) -> int:
    """Without reading them: onnx refuses weights that are the same file as the build cache's."""
    model = onnx.load(bundle.graph(graph).path, load_external_data=False)
    sizes = [onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize for tensor in model.graph.initializer]
    return sum(size * int(np.prod(tensor.dims)) for size, tensor in zip(sizes, model.graph.initializer, strict=True))


# --- what the engines hold


def test_every_graph_has_an_engine_and_a_report(built: Built) -> None:
    manifest = Bundle.open(built.path).manifest
    assert [facts.graph for facts in manifest.engines] == list(GRAPHS)
    for facts in manifest.engines:
        assert facts.file == f"engines/tensorrt-rtx/{facts.graph}.engine"
        assert {facts.file, facts.report} <= manifest.files.keys()
        report = read_report(built.path / facts.report)
        assert report == built.reports[facts.graph]
        assert report.engine_bytes == manifest.files[facts.file].size_bytes


def test_the_manifest_says_what_the_engines_run_on(dit_fp16: Built, pixart_bf16: Built) -> None:
    for built, gpus in ((dit_fp16, ("sm89", "sm120")), (pixart_bf16, ("sm89",))):
        for facts in built.result.bundle.manifest.engines:
            assert facts.target == "tensorrt-rtx"
            assert facts.gpus == gpus
            assert facts.library_version.startswith("1.")
            assert (facts.gpu_name, facts.driver, facts.any_gpu_of_architecture) == ("", "", False)
            assert f"accelerators={{{' '.join(gpus)} }}".encode() in built.plan(facts.graph)


@pytest.mark.parametrize("name", ["dit_fp16", "pixart_bf16"])
def test_every_linear_of_the_blocks_runs_in_the_precision_asked_for(name: str, request: pytest.FixtureRequest) -> None:
    built: Built = request.getfixturevalue(name)
    found = precisions(list(built.reports.values()))
    wanted = linears_of(built)
    hoisted = {layer for layer in wanted if re.search(r"feedback\.attn2\.to_[kv]", layer)}  # an input of cond
    assert wanted - hoisted <= found.keys()
    assert {found[layer] for layer in wanted - hoisted} == {built.options.precision}
    assert [kernel for report in built.reports.values() for kernel in report.outside] == []


def test_just_the_chosen_linears_run_in_fp8(dit_fp8: Built) -> None:
    found = precisions(list(dit_fp8.reports.values()))
    chosen = {layer for layer in linears_of(dit_fp8) if not layer.endswith("to_out.0")}
    assert {layer for layer, precision in found.items() if precision == "fp8"} == chosen
    assert {found[layer] for layer in linears_of(dit_fp8) - chosen} == {"fp16"}
    assert {name for report in dit_fp8.reports.values() for name in report.expected} == chosen
    assert [kernel for report in dit_fp8.reports.values() for kernel in report.outside] == []


def test_both_products_of_an_fp8_attention_are_expected_in_the_engine_of_its_graph(dit_fp8: Built) -> None:
    manifest = dit_fp8.result.bundle.manifest
    facts = manifest.fp8
    assert facts is not None
    ranges = dict.fromkeys(("transformer_blocks.1.attn1", "feedback.attn1"), AttentionAmax(1.0, 1.0, 1.0))
    manifest = replace(manifest, fp8=replace(facts, attentions=ranges))
    compiler = Compiler(RTX, LibraryFacts("", (), "", ""), None)
    for graph in manifest.graphs:
        wanted = {"loop_body": "transformer_blocks.1.attn1", "loop_feedback": "feedback.attn1"}.get(graph.name)
        expected = compiler._request(dit_fp8.result.bundle.path, manifest, graph).expected
        products = {name for name in expected if name.endswith((".scores", ".mixed"))}
        assert products == ({f"{wanted}.scores", f"{wanted}.mixed"} if wanted else set())


def test_fp32_products_are_fp32_and_never_tf32(dit_fp32: BuildResult) -> None:
    for report in dit_fp32.reports:
        assert {kernel.precision for kernel in report.kernels if kernel.kind == "matmul"} == {"fp32"}
        plan = (dit_fp32.bundle.path / f"engines/tensorrt-rtx/{report.graph}.engine").read_bytes()
        assert set(re.findall(rb"\n  tf32=(\d)\n", plan)) == {b"0"}


def test_every_attention_is_one_kernel(built: Built) -> None:
    spec = built.result.bundle.manifest.spec
    for graph, report in built.reports.items():
        assert report.fused_attentions == ATTENTIONS[spec.kind] * blocks_of(graph, spec.blocks)
        kept = "fp16" if built.options.precision is Precision.FP8 else built.options.precision
        assert {kernel.precision for kernel in report.kernels if kernel.kind == "attention"} <= {kept}


def test_no_attention_is_called_fused_that_is_not(dit_fp32: BuildResult) -> None:
    for report in dit_fp32.reports:
        softmaxes = [k for k in report.kernels if any(layer.endswith(".softmax") for layer in k.layers)]
        assert {kernel.kind for kernel in softmaxes} == ({"other"} if report.graph != "cond" else set())
        assert report.fused_attentions == 0


def test_an_engine_holds_every_weight_once(built: Built) -> None:
    for graph in GRAPHS:
        stored = {found["place"]: int(found["size"]) for found in CONSTANT.finditer(built.plan(graph))}
        held = weight_bytes(built.result.bundle, graph)
        assert LESS * held <= sum(stored.values()) <= MORE * held + ADDED_BYTES


def test_no_weight_of_a_half_engine_is_kept_in_float32(built: Built) -> None:
    for graph in GRAPHS:
        constants = list(CONSTANT.finditer(built.plan(graph)))
        assert max(int(found["size"]) for found in constants) > LARGEST_FP32_BYTES
        assert max(int(found["size"]) for found in constants if found["type"] == b"float") <= LARGEST_FP32_BYTES


def test_the_builder_tells_its_progress_engine_by_engine(dit_fp16: Built) -> None:
    assert dit_fp16.progress.names[-len(GRAPHS) :] == ENGINES
    assert dit_fp16.progress.names == dit_fp16.options.stages
    assert set(dit_fp16.result.stage_s) == set(dit_fp16.options.stages)
    phases = {what for what, _, _, detail in dit_fp16.progress.calls if detail.startswith("Building engine")}
    assert phases == set(ENGINES)


# --- the build cache


def test_a_second_build_takes_every_engine_from_the_cache(dit_fp16: Built, tmp_path: Path) -> None:
    again = compile_bundle(dit_fp16.path, tmp_path / "again.ilf", dit_fp16.options.engines, cache=dit_fp16.cache)
    assert again.reused == ENGINES
    assert again.reports == dit_fp16.result.reports
    assert again.bundle.manifest.engines == dit_fp16.result.bundle.manifest.engines
    assert Bundle.open(tmp_path / "again.ilf").manifest.files == dit_fp16.result.bundle.manifest.files


@pytest.mark.parametrize("name", ["dit_fp16", "pixart_bf16"])
def test_a_feedback_block_trained_again_costs_one_engine(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    built: Built = request.getfixturevalue(name)
    other = build(str(retrained(built.checkpoint, tmp_path / "checkpoint")), tmp_path / "other.ilf", built.options)
    assert other.bundle.manifest.scales != built.result.bundle.manifest.scales
    assert other.reused == (*GRAPHS_KEPT, *ENGINES_KEPT)


def test_builds_of_other_precisions_share_no_engine(dit_fp16: Built, dit_fp8: Built) -> None:
    assert dit_fp16.cache == dit_fp8.cache
    assert dit_fp16.result.reused == dit_fp8.result.reused == ()


# --- the build cache, with a worker that only writes


OTHER_OPTIONS = (
    RTX,
    replace(RTX, gpus=(BLACKWELL,)),
    replace(RTX, gpus=(ADA, BLACKWELL)),
    replace(RTX, builder_level=4),
    replace(RTX, workspace_bytes=1 << 30),
    EngineOptions(Library.TENSORRT),
    EngineOptions(Library.TENSORRT, any_gpu_of_architecture=True),
)


@pytest.fixture
def compiled(worker: Worker, dit_bundle: Path, tmp_path: Path) -> Callable[..., BuildResult]:
    """Compile the shared bundle once more, into the same cache."""
    folders = count()

    def run(options: EngineOptions = RTX, **changes: Any) -> BuildResult:
        settings = {"cache": tmp_path / "cache", **changes}
        return compile_bundle(dit_bundle, tmp_path / f"{next(folders)}.ilf", options, **settings)

    return run


def keys(result: BuildResult) -> set[str]:
    return {facts.key for facts in result.bundle.manifest.engines}


def test_equal_requests_build_once(compiled: Callable[..., BuildResult], worker: Worker) -> None:
    first, second = compiled(), compiled()
    assert worker.built == list(GRAPHS)
    assert (first.reused, second.reused) == ((), ENGINES)
    assert keys(first) == keys(second)
    assert len(keys(first)) == len(GRAPHS)


def test_every_option_that_changes_an_engine_is_part_of_its_key(compiled: Callable[..., BuildResult]) -> None:
    results = [compiled(options) for options in OTHER_OPTIONS]
    assert [result.reused for result in results] == [()] * len(OTHER_OPTIONS)
    assert len(set().union(*map(keys, results))) == len(OTHER_OPTIONS) * len(GRAPHS)


@pytest.mark.parametrize("change", [{"version": "1.7.2"}, {"gpu_name": "another GPU"}, {"driver": "580.66"}], ids=str)
def test_another_library_or_gpu_is_another_key(
    change: dict[str, str], compiled: Callable[..., BuildResult], worker: Worker
) -> None:
    first = compiled()
    worker.facts = replace(worker.facts, **change)
    other = compiled()
    assert other.reused == ()
    assert keys(other).isdisjoint(keys(first))


def test_a_bundle_is_not_changed_when_its_cache_is(compiled: Callable[..., BuildResult], tmp_path: Path) -> None:
    first = compiled()
    for report in (tmp_path / "cache").glob("entries/*/report"):
        report.write_text("{}")
    assert compiled().reused == ()
    assert Bundle.open(first.bundle.path).manifest == first.bundle.manifest
    assert compiled().reused == ENGINES


def test_whether_timings_are_kept_is_no_part_of_a_key(compiled: Callable[..., BuildResult]) -> None:
    compiled()
    assert compiled(replace(RTX, timing_cache=False)).reused == ENGINES


def test_where_a_bundle_lies_is_no_part_of_a_key(
    compiled: Callable[..., BuildResult], dit_bundle: Path, tmp_path: Path
) -> None:
    compiled()
    elsewhere = Path(shutil.copytree(dit_bundle, tmp_path / "elsewhere.ilf"))
    assert compile_bundle(elsewhere, tmp_path / "x.ilf", RTX, cache=tmp_path / "cache").reused == ENGINES


def test_without_a_cache_everything_is_built(compiled: Callable[..., BuildResult], worker: Worker) -> None:
    compiled()
    assert compiled(cache=None).reused == ()
    assert worker.built == [*GRAPHS, *GRAPHS]


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"other"), Path.unlink], ids=["changed", "gone"])
@pytest.mark.parametrize("name", ["engine", "report", "entry.json"])
def test_a_damaged_entry_is_built_and_kept_again(
    name: str, damage: Callable[[Path], object], compiled: Callable[..., BuildResult], worker: Worker, tmp_path: Path
) -> None:
    first = compiled()
    (facts,) = (facts for facts in first.bundle.manifest.engines if facts.graph == "post")
    place = tmp_path / "cache" / "entries" / facts.key / name
    damage(place)
    second = compiled()
    assert second.reused == ENGINES[:-1]
    assert worker.built == [*GRAPHS, "post"]
    assert compiled().reused == ENGINES


def test_a_cache_that_cannot_be_written_is_done_without(compiled: Callable[..., BuildResult], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = compiled(cache=tmp_path / "file" / "cache")
    assert result.reused == ()
    assert Bundle.open(result.bundle.path).manifest.engines


# --- what stands in a bundle beside the engines


def test_engines_of_another_library_stay(compiled: Callable[..., BuildResult], worker: Worker, tmp_path: Path) -> None:
    first = compiled()
    second = compile_bundle(first.bundle.path, tmp_path / "both.ilf", EngineOptions(Library.TENSORRT))
    assert [facts.target for facts in second.bundle.manifest.engines] == ["tensorrt-rtx"] * 5 + ["tensorrt"] * 5
    assert first.bundle.manifest.engines == second.bundle.manifest.engines[:5]
    assert Bundle.open(tmp_path / "both.ilf").manifest == second.bundle.manifest


def test_engines_of_the_same_library_are_replaced(
    compiled: Callable[..., BuildResult], worker: Worker, tmp_path: Path
) -> None:
    first = compiled(replace(RTX, gpus=(ADA, BLACKWELL)))
    second = compile_bundle(first.bundle.path, first.bundle.path, RTX, force=True)
    assert [facts.gpus for facts in second.bundle.manifest.engines] == [("sm89",)] * 5
    assert Bundle.open(first.bundle.path).manifest == second.bundle.manifest


def test_a_stripped_bundle_cannot_be_compiled_again(compiled: Callable[..., BuildResult], tmp_path: Path) -> None:
    stripped = compiled(strip=True)
    assert not list(stripped.bundle.path.glob("graphs/*"))
    with pytest.raises(BundleError, match="has no graph 'cond' to compile; build the bundle again"):
        compile_bundle(stripped.bundle.path, tmp_path / "again.ilf", RTX)
    assert not (tmp_path / "again.ilf").exists()


def test_a_folder_may_be_relative_or_a_link(
    worker: Worker, dit_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = Bundle.open(dit_bundle).manifest
    copy = Path(shutil.copytree(dit_bundle, tmp_path / "copy.ilf"))
    (tmp_path / "link").symlink_to(copy)
    monkeypatch.chdir(tmp_path)
    Compiler.open(RTX, manifest.precision, None).compile(Path("link"), manifest, lambda stage: None)
    assert len(Bundle.open(copy).manifest.engines) == len(GRAPHS)


# --- what is refused before anything is built


def test_a_gpu_that_the_library_has_not_is_refused_with_those_that_it_has(worker: Worker) -> None:
    hopper = replace(RTX, gpus=(Architecture(9, 0),))
    with pytest.raises(InvalidRequest, match=r"no target sm90; it has sm89, sm120; Hopper .* need --target tensorrt$"):
        Compiler.open(hopper, Precision.FP16, None)
    with pytest.raises(InvalidRequest, match=r"no target sm70; it has sm89, sm120$"):
        Compiler.open(replace(RTX, gpus=(Architecture(7, 0),)), Precision.FP16, None)


@pytest.mark.parametrize(("precision", "gpu"), [(Precision.FP8, (8, 0)), (Precision.BF16, (7, 5))])
def test_a_precision_that_a_gpu_has_not_is_refused(precision: Precision, gpu: tuple[int, int], worker: Worker) -> None:
    architecture = Architecture(*gpu)
    worker.facts = replace(worker.facts, gpus=(architecture, ADA))
    for options in (replace(RTX, gpus=(ADA, architecture)), EngineOptions(Library.TENSORRT)):
        with pytest.raises(InvalidRequest, match=f"^{architecture} has no {precision} units"):
            Compiler.open(options, precision, None)


def test_options_that_contradict_one_another_are_refused(worker: Worker) -> None:
    with pytest.raises(InvalidRequest, match="say for which GPUs"):
        Compiler.open(EngineOptions(Library.TENSORRT_RTX), Precision.FP16, None)


def test_the_graph_of_a_linear_is_that_of_its_block(dit_bundle: Path) -> None:
    manifest = Bundle.open(dit_bundle).manifest  # four blocks, the second and the third in the loop
    names = [f"transformer_blocks.{index}.ff.net.2" for index in range(4)]
    assert [manifest.spec.graph_of_linear(name) for name in names] == ["pre", "loop_body", "loop_body", "post"]
    assert manifest.spec.graph_of_linear("feedback.attn1.to_q") == "loop_feedback"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"graph": "pre"}', "no JSON", '{"kernels": 1}'])
def test_a_report_that_is_none_is_a_bundle_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "pre.json").write_text(text)
    with pytest.raises(BundleError, match=r"pre\.json .*; compile the bundle again"):
        read_report(tmp_path / "pre.json")
