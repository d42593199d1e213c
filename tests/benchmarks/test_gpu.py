"""The benchmark of a GPU without a GPU: the dry run, its files, its rivals and its tables."""

import contextlib
import csv
import io
import logging
import re
import shlex
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import checkout, record, tables
from benchmarks.rivals import full_size_models, unsplit
from benchmarks.speed import gpu, gpu_pieces, gpu_smoke, gpu_tables, hoisting, rows
from benchmarks.speed import machine as speed_machine
from ilf_trt import attach, load_ilf
from ilf_trt.assembly.conductor import BuildResult
from ilf_trt.bench import rivals
from ilf_trt.bench.one_graph import export_unsplit, unsplit_graph
from ilf_trt.contract.bundle import Bundle
from ilf_trt.contract.plan import SCHEDULERS, cached_block_forwards, make_plan
from ilf_trt.contract.spec import Loop, Precision
from ilf_trt.contract.target import Architecture, EngineOptions, Library
from ilf_trt.engines.profiles import profile_of
from ilf_trt.errors import DeviceError, InvalidRequest
from ilf_trt.export.segments import spec_of
from ilf_trt.model.sampling import sample
from ilf_trt.runtime import Pipeline
from ilf_trt.runtime.trajectory import RunOptions
from tests.conftest import BLOCKS, LOOP, small_dit, small_pixart
from tests.ilf_trt.model.test_sampling import dit_conditions, noise_of, pixart_conditions
from tests.runtime.conftest import VERSIONS, Compiled, Machine, compiled, machine

__all__ = ["compiled", "machine"]

ROOT = Path(__file__).parent.parent.parent
BENCHMARKS = ROOT / "benchmarks"
TIMEOUT_S = 300
SOLVER = SCHEDULERS["dpmsolver++"]
GUIDANCE = 2.0
ROUNDING = 1e-5
TORCH_ROWS = (
    "eager diffusers",
    "eager diffusers at equal cost",
    "torch.compile",
    "eager, middle blocks cached (the paper's)",
    "eager, cache-dit",
    "eager ILF",
    "torch.compile ILF",
)
CAPTURED_ROWS = (
    "captured plain steps by torch",
    "captured plain steps by torch at equal cost",
    "captured ILF by torch",
)
ENGINE_ROWS = ("one graph a step", "five graphs", "ilf-trt ILF")
NUMBERS = ("denoise_p50_ms", "denoise_p90_ms", "end_to_end_ms", "faster_than_eager_20", "cold_load_s", "block_forwards")


def run(*arguments: object) -> tuple[int, str]:
    """The benchmark in this process, which has torch loaded: its exit code and what it printed."""
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(sys, "argv", ["gpu", *map(str, arguments)])
        patch.setattr(rows, "MIN_REPEATS", 2)
        patch.setattr(rows, "WARM_UPS", 1)
        patch.setattr(speed_machine, "SAMPLES", 2)
        patch.setitem(full_size_models.TINY["tiny-dit"]["config"], "num_layers", 3)
        try:
            code = gpu.main()
        finally:
            logging.disable(logging.NOTSET)
            torch.compiler.reset()
    return code, output.getvalue()


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def results() -> dict[str, bytes]:
    files = (path for path in (BENCHMARKS / "results").rglob("*") if path.is_file())
    return {path.relative_to(BENCHMARKS).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The whole dry run: its folder and its output."""
    folder, before = tmp_path_factory.mktemp("gpu") / "dry", results()
    code, output = run("--dry-run", "--output", folder, "--library", "tensorrt", "onnxruntime")
    assert code == 0
    assert results() == before
    return folder, output


# --- the dry run


def test_a_dry_run_has_every_row(dry: tuple[Path, str]) -> None:
    rows = rows_of(dry[0] / "gpu-latency.csv")
    assert [(row["row"], row["library"], row["precision"]) for row in rows] == [
        *((name, "torch", "fp16") for name in TORCH_ROWS),
        *((name, "torch-graph", "fp16") for name in CAPTURED_ROWS),
        *(
            (name, library, precision)
            for library in ("tensorrt", "onnxruntime")
            for name in ENGINE_ROWS
            for precision in (gpu.PRECISIONS if name == "ilf-trt ILF" else ("fp16",))
        ),
    ]


def test_a_row_of_a_dry_run_has_numbers_or_a_reason(dry: tuple[Path, str]) -> None:
    for row in rows_of(dry[0] / "gpu-latency.csv"):
        filled = {bool(row[column]) for column in (*NUMBERS, "relative_difference")}
        assert filled == {not row["note"]}, row


def test_a_library_that_is_not_there_says_so_in_each_of_its_rows(dry: tuple[Path, str]) -> None:
    for name in ("gpu-build", "gpu-parity", "gpu-latency"):
        notes = [row["note"] for row in rows_of(dry[0] / f"{name}.csv") if row["library"] == "tensorrt"]
        assert notes
        assert all("--target tensorrt needs tensorrt" in note for note in notes)


def test_nothing_of_a_dry_run_says_that_it_was_measured_on_a_gpu(dry: tuple[Path, str]) -> None:
    for path in dry[0].glob("*.csv"):
        for row in rows_of(path):
            assert row["gpu"] == "none, a dry run on the CPU"
            assert row["device"].startswith("no GPU, none, a dry run on the CPU; ")
            assert not any(row.get(column) for column in ("peak_device_mib", "build_s"))
    for text in (dry[1], (dry[0] / "gpu-latency.md").read_text()):
        assert "dry run on a CPU with a tiny model: these numbers measure no GPU" in text
        assert "reached" not in text


@pytest.mark.parametrize("precision", gpu.PRECISIONS)
def test_a_bundle_has_fp8_attention_only_if_its_precision_says_so(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Any] = []
    monkeypatch.setattr(gpu_pieces, "build", lambda checkpoint, output, options, force: built.append(options))
    job: Any = SimpleNamespace(work=tmp_path, machine=SimpleNamespace(device="cpu"), graph_parity=False)
    bench: Any = SimpleNamespace(name="pixart-alpha-1024", batch=1, bundle=lambda name: tmp_path / f"{name}.ilf")
    gpu_pieces._export(job, bench, precision)
    built[0].check()
    assert built[0].precision is Precision(precision.partition("-")[0])
    assert built[0].has_fp8_attention(4096) is (precision == "fp8-attention")


def test_a_dry_run_holds_every_graph_and_both_plans_against_torch(dry: tuple[Path, str]) -> None:
    rows = [row for row in rows_of(dry[0] / "gpu-parity.csv") if row["library"] == "onnxruntime"]
    for precision in gpu.PRECISIONS:
        by_tensor = {row["what"]: row for row in rows if row["precision"] == precision}
        assert {what.split()[0] for what in by_tensor} >= {
            "cond",
            "pre",
            "loop_body",
            "loop_feedback",
            "post",
            "trajectory",
        }
        assert {"latents after 20 steps", "latents after 10 steps"} <= by_tensor.keys()
        assert all(float(row["relative"]) <= float(row["limit"]) for row in by_tensor.values())


def test_one_graph_and_five_graphs_lead_to_the_latents_of_torch(dry: tuple[Path, str]) -> None:
    rows = {row["row"]: row for row in rows_of(dry[0] / "gpu-latency.csv") if row["library"] == "onnxruntime"}
    for name in ("one graph a step", "five graphs"):
        assert float(rows[name]["relative_difference"]) <= Precision.FP16.parity_limit


def test_captured_rows_of_torch_lead_to_the_latents_of_torch(dry: tuple[Path, str]) -> None:
    rows = [row for row in rows_of(dry[0] / "gpu-latency.csv") if row["library"] == "torch-graph"]
    assert [row["steps"] for row in rows] == ["20", rows[1]["steps"], "10"]
    for row in rows:
        assert row["captured"] == "yes"
        assert float(row["relative_difference"]) <= Precision.FP16.parity_limit
    assert float(rows[0]["psnr_db"]) > float(rows[2]["psnr_db"])


@pytest.mark.slow
def test_only_the_rows_of_a_call_are_measured_in_their_order(tmp_path: Path) -> None:
    arguments = ("--dry-run", "--output", tmp_path, "--piece", "latency", "--model", "tiny-pixart")
    code, output = run(*arguments, "--row", "captured-ilf", "ilf", "eager ILF", "cached", "--skip", "cached", "ilf")
    assert code == 0
    assert [row["row"] for row in rows_of(tmp_path / "gpu-latency.csv")] == ["captured ILF by torch", "eager ILF"]
    assert "left for another call: 0" in output


def documented(module: str) -> list[list[str]]:
    """The arguments of a module's commands in the document, without comments."""
    text = (ROOT / "docs" / "performance.md").read_text().replace("\\\n", " ")
    lines = re.findall(rf"^python -m {re.escape(module)}(?: (.*))?$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.slow
def test_the_command_for_a_host_without_engine_libraries_measures_its_rows(tmp_path: Path) -> None:
    command = next(command for command in documented("benchmarks.speed.gpu") if "--row" in command)
    models = command.index("--model") + 1
    assert command[models : models + 2] == ["pixart-alpha-1024", "dit-xl-256"]
    assert run(*command, "--dry-run", "--output", tmp_path, "--model", "tiny-dit", "--row-seconds", 0)[0] == 0
    measured = rows_of(tmp_path / "gpu-latency.csv")
    assert [row["row"] for row in measured] == [rows.SLUGS[slug] for slug in command[command.index("--row") + 1 :]]
    assert {row["row"]: row["note"] for row in measured if row["note"]} == {}


def test_the_commands_of_the_smoke_test_are_those_of_the_document() -> None:
    for command in documented("benchmarks.speed.gpu_smoke"):
        assert gpu_smoke._options(command).minutes <= 4.5


def test_an_unknown_row_is_refused_with_the_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--row", "--skip"):
        code, _ = run("--dry-run", "--output", tmp_path / "none", option, "eager", "quick")
        assert code == 2
        line = capsys.readouterr().err
        assert "error: row 'quick' is unknown; the rows are eager (eager diffusers), " in line
        assert "captured-ilf (captured ILF by torch)" in line
    assert not (tmp_path / "none").exists()


def test_every_row_has_a_short_name(tmp_path: Path) -> None:
    full_size_models.make_checkpoint("tiny-dit", tmp_path / "tiny-dit")
    machine = speed_machine.Machine(dry_run=True)
    bench = rows.Bench("tiny-dit", 1, tmp_path, machine, "fp16", rows.CompileOptions())
    names = [entry.name for entry in bench.entries(["tensorrt"], ["fp16"])]
    assert list(rows.SLUGS.values()) == names
    assert not set(rows.SLUGS) & set(names)


def test_a_second_call_measures_nothing_again(dry: tuple[Path, str]) -> None:
    folder = dry[0]
    before = {path.name: path.read_bytes() for path in folder.glob("*.csv")}
    code, output = run("--dry-run", "--output", folder, "--library", "tensorrt", "onnxruntime")
    assert code == 0
    assert {path.name: path.read_bytes() for path in folder.glob("*.csv")} == before
    assert "left for another call: 0" in output


@pytest.mark.slow
def test_a_call_stops_at_its_deadline_and_says_what_is_left(tmp_path: Path) -> None:
    code, output = run("--dry-run", "--output", tmp_path, "--piece", "facts", "build", "latency", "--minutes", 0)
    assert code == 0
    assert {row["what"] for row in rows_of(tmp_path / "gpu-facts.csv")} >= {"matmul fp16", "matmul fp8"}
    assert not (tmp_path / "gpu-build.csv").exists()
    left = output.partition("left for another call: ")[2].splitlines()
    assert left == ["2", "  checkpoint tiny-dit", "  checkpoint tiny-dit"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs no GPU")
def test_without_a_gpu_it_is_refused_unless_it_is_a_dry_run() -> None:
    with pytest.raises(DeviceError, match="pass --dry-run"):
        speed_machine.Machine(dry_run=False)


# --- rows and tables


def test_a_row_names_the_packages_that_are_there_and_leaves_out_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "TOOLS", ("numpy", "no-such-package"))
    assert record.environment()["versions"] == f"numpy={np.__version__}"


def test_a_row_of_a_gpu_names_it_before_the_host() -> None:
    columns = record.Records(gpu="NVIDIA H100, driver 580, CUDA 13.0", commit="abc").environment()
    assert columns["device"].startswith("NVIDIA H100, driver 580, CUDA 13.0; ")
    assert "cuda-core=" in columns["versions"]
    assert columns["commit"] == "abc"


def test_without_git_the_commit_is_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert record.environment()["commit"] == "unknown"


def test_rows_are_replaced_by_key_and_copied(tmp_path: Path) -> None:
    records = record.Records(tmp_path / "a", copies=tmp_path / "b")
    records.append("t", "c", [{"key": 1, "value": "old"}, {"key": 2, "value": "kept"}], key=("key",))
    path = records.append("t", "c", [{"key": 1, "value": "new", "note": "wider"}], key=("key",))
    assert [(row["key"], row["value"], row["note"]) for row in rows_of(path)] == [
        ("2", "kept", ""),
        ("1", "new", "wider"),
    ]
    assert (tmp_path / "b" / "t.csv").read_bytes() == path.read_bytes()


def gpu_row(**values: str) -> dict[str, str]:
    columns = dict.fromkeys(gpu_pieces.LATENCY_COLUMNS, "")
    shared = {
        "gpu": "NVIDIA H100",
        "device": "NVIDIA H100; host",
        "versions": "torch=2",
        "batch": "1",
        "library": "tensorrt",
    }
    times = {"denoise_p50_ms": "10", "denoise_p90_ms": "11", "faster_low": "2", "faster_high": "9"}
    return {**columns, **shared, "row": "ilf-trt ILF", "steps": "10", **times, "faster_than_eager_20": "3", **values}


def test_without_rows_every_table_says_that_no_gpu_was_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = gpu_tables
    monkeypatch.setattr(tables, "read_rows", lambda name: [])
    for table in (tables.gpu_latency, tables.gpu_facts, tables.gpu_parity):
        assert table() == "Not measured: no GPU was at hand."
    assert len(tables.gpu_limits()) == len(tables.LIMITS)
    assert all(line.startswith("not measured: ") for line in tables.gpu_limits())


def test_rows_without_numbers_stand_below_the_table_by_reason() -> None:
    no_numbers = {
        "denoise_p50_ms": "",
        "note": "tensorrt-rtx refused this GPU",
        "library": "tensorrt-rtx",
        "model": "m",
    }
    rows = [gpu_row(model="m", precision="fp16"), *(gpu_row(precision=p, **no_numbers) for p in ("fp16", "fp8"))]
    lines = gpu_tables.gpu_latency(rows).splitlines()
    assert lines[2].startswith("| m | 1 | ilf-trt ILF | tensorrt | fp16 | 10 |")
    assert "Measured on NVIDIA H100; host; torch=2." in lines
    assert lines[-1] == (
        "Not measured: ilf-trt ILF (tensorrt-rtx fp16), ilf-trt ILF (tensorrt-rtx fp8) of m batch 1: "
        "tensorrt-rtx refused this GPU."
    )


def test_a_limit_is_reached_by_the_best_library_of_a_gpu() -> None:
    alpha = {"model": "pixart-alpha-1024", "precision": "fp16"}
    rows = [
        gpu_row(**alpha, faster_than_eager_20="2.9", linear_share="0.5"),
        gpu_row(**alpha, faster_than_eager_20="3.1", library="onnxruntime"),
        gpu_row(model="dit-xl-256", precision="fp16", faster_than_eager_20="4.0", launch_us="20"),
        gpu_row(model="pixart-alpha-1024", precision="fp8", batch="4", faster_than_eager_20="9"),
    ]
    roofline = [
        {"gpu": "H100 SXM", **alpha, "faster_ilf": "3.8", "linear_share": "0.7"},
        {"gpu": "H100 SXM", "model": "dit-xl-256", "precision": "fp16", "faster_ilf": "6", "linear_share": "0.4"},
    ]
    assert [line.partition(":")[0] for line in gpu_tables.gpu_limits(rows, roofline)] == [
        "reached",
        "not measured",
        "not measured",
        "not reached",
        "not reached",
        "reached",
    ]


def test_tables_are_written_where_a_document_has_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    filled, count = tables._fill("a\n<!-- table x -->\nold\n<!-- end -->\nb", "x", lambda: "new")
    assert (filled, count) == ("a\n<!-- table x -->\nnew\n<!-- end -->\nb", 1)


def test_the_matrix_rate_is_the_best_of_square_products() -> None:
    rows = [
        {"gpu": gpu, "what": f"matmul {dtype}", "size": size, "median": median}
        for gpu, dtype, size, median in (
            ("a", "fp16", "8x8x8", "700"),
            ("a", "fp16", "9x9x9", "750"),
            ("a", "fp16", "8x9x8", "900"),
            ("a", "fp8", "8x8x8", ""),
            ("b", "fp16", "8x8x8", "990"),
        )
    ]
    rate = speed_machine.measured_rate
    assert [rate(rows, "a", dtype) for dtype in ("fp16", "fp8", "bf16")] == [750.0, None, None]


# --- the base lines


def plain_plan(steps: int) -> Any:
    return make_plan(SOLVER, steps, blocks=BLOCKS, loop=Loop(*LOOP), feedback="none")


@pytest.mark.parametrize("kind", ["dit", "pixart"])
def test_cached_blocks_run_as_often_as_the_papers_cost_says(kind: str) -> None:
    backbone = small_dit() if kind == "dit" else small_pixart(sized=True)
    conditions, noise = dit_conditions() if kind == "dit" else pixart_conditions(), noise_of(backbone)
    lines = rivals.Eager(attach(backbone, LOOP), SOLVER, GUIDANCE, "cpu", torch.float32)
    plan = plain_plan(7)
    costs = cached_block_forwards(BLOCKS, 7, cached=rivals.cached_blocks(BLOCKS), every=rivals.CACHED_EVERY)
    block_forwards = 0

    def count(module: Any, *_: Any) -> None:
        nonlocal block_forwards
        block_forwards += type(module).__name__ == "BasicTransformerBlock"

    with lines.cached(plan) as trajectory:
        first = trajectory(conditions, noise)
        hook = torch.nn.modules.module.register_module_forward_hook(count)
        try:
            second = trajectory(conditions, noise)
        finally:
            hook.remove()
    assert block_forwards == sum(costs) < plan.block_forwards
    assert torch.equal(first, second)
    plain = sample(backbone, plan, SOLVER, conditions, noise, guidance_scale=GUIDANCE)
    assert not torch.allclose(first, plain)


def test_blocks_that_run_again_at_every_step_change_nothing() -> None:
    blocks = [torch.nn.Linear(4, 4) for _ in range(3)]
    cached = rivals.CachedBlocks(blocks, every=1, steps=5)
    for _ in range(4):
        tokens = torch.randn(2, 4)
        assert torch.equal(cached(tokens), blocks[2](blocks[1](blocks[0](tokens))))


def test_between_what_the_blocks_added_is_added_to_the_new_input() -> None:
    cached = rivals.CachedBlocks([torch.nn.Linear(4, 4)], every=3, steps=4)
    first, second = torch.randn(2, 2, 4)
    added = cached(first) - first
    assert torch.equal(cached(second), second + added)
    assert torch.equal(cached(first), first + added)
    assert torch.allclose(cached(second), cached.blocks[0](second))  # step 3
    assert torch.allclose(cached(second), cached.blocks[0](second))  # step 0 of the next trajectory


def test_the_papers_model_has_18_cached_blocks_and_326_block_forwards() -> None:
    inside = rivals.cached_blocks(28)
    assert inside == 18
    assert sum(cached_block_forwards(28, 20, cached=inside, every=3)) == 326


def test_the_linears_of_a_plan_are_counted_with_every_graph_run() -> None:
    with torch.device("meta"):
        model = attach(small_dit(), LOOP)
    options: Any = {"guidance": True, "text_tokens": 1, "train_timesteps": 1000, "precision": Precision.FP16}
    plan = make_plan(SOLVER, 5, blocks=BLOCKS, loop=Loop(*LOOP), feedback="first:1")
    flop = hoisting.linear_flop(model, spec_of(model, **options), plan, 3)
    width, tokens, rows, times, waves = 64, 16, 6, len(plan.times), 256
    blocks = plan.block_forwards * rows * tokens * 12 * width**2  # four of attention, eight of the feed-forward
    head = len(plan.steps) * rows * tokens * width * 2 * 2 * 2  # patches of 2 x 2, two channels
    embedder = times * (waves * width + width**2)
    cond = (BLOCKS + 1) * (embedder + times * rows * 6 * width**2) + embedder + times * rows * 2 * width**2
    assert flop == 2 * (blocks + head + cond)


# --- one graph a step


@pytest.fixture(scope="module")
def one_graph(pixart_build: BuildResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The step of `pixart_build` as one graph."""
    path = tmp_path_factory.mktemp("unsplit") / "unsplit.onnx"
    export_unsplit(load_ilf(pixart_build.bundle.path.parent / "checkpoint"), pixart_build.bundle.manifest, path)
    return path


@pytest.mark.parametrize("library", [None, Library.TENSORRT], ids=["cpu", "gpu"])
def test_one_graph_a_step_equals_five_graphs(
    library: Library | None,
    pixart_build: BuildResult,
    one_graph: Path,
    tmp_path: Path,
    machine: Machine,
    compiled: Compiled,
) -> None:
    bundle, whole = pixart_build.bundle, one_graph
    if library is not None:
        bundle = Bundle.open(compiled(bundle.path, library))
        graph = unsplit_graph({each.name: each for each in bundle.manifest.graphs})
        fake = import_module("fake_tensorrt")
        profile = profile_of(graph, bundle.manifest.batch, bundle.manifest.spec, times=1)
        engine = tmp_path / "unsplit.engine"
        fake.write_plan(
            engine, whole, profile=profile, scratch_bytes=4096, name=graph.name, version=VERSIONS[library.value]
        )
        whole = engine
    pictures = 3
    noise = np.random.default_rng(3).standard_normal((pictures, *bundle.manifest.spec.latent), np.float32)
    conditioning, normal = bundle.manifest.spec.conditioning, np.random.default_rng(4).standard_normal
    conditions = conditioning.example(pictures, (128, 128), guidance=True, normal=normal)
    rows = conditioning.rows(conditions, guided=True)
    with Pipeline.load(pixart_build.bundle.path, threads=1) as pipeline:
        plan = pipeline.plan(5, feedback="none")
        expected = pipeline.generate(latents=noise, plan=plan, guidance_scale=GUIDANCE, **conditions).latents
    device = "cpu" if library is None else "cuda:0"
    with unsplit.opened(bundle, plan, pictures, whole, device=device, library=library) as trajectory:
        for _ in range(3):
            latents, timings = trajectory.run(noise, rows, GUIDANCE, RunOptions())
            assert np.abs(latents - expected).max() <= ROUNDING * np.abs(expected).max()
    assert timings.captured == (library is not None)


def test_its_engine_needs_a_gpu_that_the_library_builds_for(pixart_build: BuildResult, tmp_path: Path) -> None:
    hopper = EngineOptions(Library.TENSORRT_RTX, (Architecture(9, 0),))
    with pytest.raises(InvalidRequest, match=r"tensorrt-rtx .* has no target sm90; .*Hopper"):
        unsplit.build_unsplit(pixart_build.bundle.manifest, tmp_path / "a.onnx", tmp_path / "a.engine", hopper)


@pytest.mark.slow
def test_its_engine_is_built_and_reported(pixart_build: BuildResult, one_graph: Path, tmp_path: Path) -> None:
    ada = EngineOptions(Library.TENSORRT_RTX, (Architecture(8, 9),), builder_level=0)
    report = unsplit.build_unsplit(pixart_build.bundle.manifest, one_graph, tmp_path / "a.engine", ada)
    assert report.graph == "unsplit"
    assert report.engine_bytes == (tmp_path / "a.engine").stat().st_size
    assert report.kernels


# --- a checkout that is not installed


@pytest.mark.slow
def test_a_checkout_is_importable_without_being_installed(tmp_path: Path) -> None:
    folder = checkout.lay_out(tmp_path)
    checkout.lay_out(tmp_path)
    code = (
        "import ilf_trt, ilf_trt.engines, ilf_trt.runtime\n"
        "from importlib.metadata import version\n"
        "from importlib.resources import files\n"
        "from importlib.util import find_spec\n"
        "assert find_spec('ilf_trt.model.backbone') and find_spec('ilf_trt.export.bundle')\n"
        "assert (files('ilf_trt') / 'demo' / 'ilf.json').is_file()\n"
        "print(ilf_trt.__file__, ilf_trt.runtime.__file__, version('ilf-trt'))"
    )
    process = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        timeout=TIMEOUT_S,
    )
    assert process.returncode == 0, process.stderr
    top, runtime, version = process.stdout.split()
    assert Path(top).is_relative_to(folder)
    assert Path(runtime).is_relative_to(folder)
    assert version == import_module("ilf_trt").__version__
