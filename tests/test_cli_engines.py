"""The command line about engines: build with a target, compile, inspect --engines, and the build cache."""

import shutil
from pathlib import Path

import pytest

from ilf_trt.cli import main
from ilf_trt.contract.bundle import Bundle
from tests.conftest import Run, small_dit, write_checkpoint

RTX = ("--target", "tensorrt-rtx", "--gpu", "sm89")
QUICK = ("--batch", 1, "--steps", 2, "--feedback", "all")
GRAPHS = {"cond", "pre", "loop_body", "loop_feedback", "post"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    backbone = small_dit(num_layers=3, num_attention_heads=2)
    return write_checkpoint(tmp_path_factory.mktemp("three") / "checkpoint", backbone, (1, 1))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def rtx_bundle(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, cache: Path) -> Path:
    """FP16 with engines for sm89."""
    out = tmp_path_factory.mktemp("rtx") / "rtx.ilf"
    tokens = ("build", "--checkpoint", checkpoint, "-o", out, *QUICK, "--precision", "fp16", *RTX, "--cache-dir", cache)
    assert main([str(token) for token in tokens]) == 0
    return out


def words(text: str) -> str:
    return " ".join(text.split())


def test_build_with_a_target_puts_an_engine_and_a_report_of_every_graph_into_the_bundle(rtx_bundle: Path) -> None:
    engines = Bundle.open(rtx_bundle).manifest.engines
    assert {facts.graph for facts in engines} == GRAPHS
    assert {(facts.target, facts.gpus) for facts in engines} == {("tensorrt-rtx", ("sm89",))}
    assert all((rtx_bundle / facts.file).stat().st_size for facts in engines)


def test_a_second_build_takes_everything_from_the_cache_and_says_so(
    run: Run,
    checkpoint: Path,
    rtx_bundle: Path,
    cache: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "again.ilf"
    options = (*QUICK, "--precision", "fp16", *RTX, "--cache-dir", cache)
    ran = run("build", "--checkpoint", checkpoint, "-o", out, *options)
    assert ran.code == 0, ran.err
    told = words(ran.out).partition("taken from the build cache: ")[2]
    for graph in GRAPHS:
        assert f"graph {graph}" in told
        assert f"engine {graph}" in told
    first, second = ({n: f.sha256 for n, f in Bundle.open(path).manifest.files.items()} for path in (rtx_bundle, out))
    assert first == second


def test_without_the_cache_everything_is_built_again(
    run: Run,
    checkpoint: Path,
    rtx_bundle: Path,
    tmp_path: Path,
) -> None:
    options = (*QUICK, "--precision", "fp16", *RTX, "--no-cache")
    ran = run("build", "--checkpoint", checkpoint, "-o", tmp_path / "again.ilf", *options)
    assert ran.code == 0, ran.err
    assert "taken from" not in ran.out


def test_inspect_names_the_target(run: Run, rtx_bundle: Path) -> None:
    assert "for sm89, 5 engines" in words(run("inspect", rtx_bundle).out)


def test_inspect_engines_names_every_linear_with_its_precision(run: Run, rtx_bundle: Path) -> None:
    ran = run("inspect", rtx_bundle, "--engines")
    assert ran.code == 0, ran.err
    for block in ("transformer_blocks.0", "transformer_blocks.1", "transformer_blocks.2", "feedback"):
        for layer in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2"):
            assert f"{block}.{layer} " in ran.out


def test_inspect_engines_as_json_holds_every_report(run: Run, rtx_bundle: Path) -> None:
    reports = run("inspect", rtx_bundle, "--engines", "--json").data
    assert {report["graph"] for report in reports} == GRAPHS
    assert all(report["kernels"] and report["engine_bytes"] for report in reports)


def test_inspect_engines_of_a_bundle_without_says_how_to_add_them(run: Run, dit_bundle: Path) -> None:
    run("inspect", dit_bundle, "--engines").refused("has no engines", "ilf-trt compile")


def test_compile_adds_engines_in_place_and_leaves_the_graphs(
    run: Run,
    rtx_bundle: Path,
    cache: Path,
    tmp_path: Path,
) -> None:
    bundle = Path(shutil.copytree(rtx_bundle, tmp_path / "copy.ilf"))
    ran = run("compile", bundle, "--target", "tensorrt-rtx", "--gpu", "sm86,sm120", "--cache-dir", cache)
    assert ran.code == 0, ran.err
    manifest = Bundle.open(bundle).manifest
    assert {facts.gpus for facts in manifest.engines} == {("sm86", "sm120")}
    assert len(manifest.engines) == len(GRAPHS)
    assert run("verify", bundle).code == 0


def test_a_stripped_bundle_is_shown_and_not_served_by_the_cpu(
    run: Run,
    rtx_bundle: Path,
    cache: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "stripped.ilf"
    ran = run("compile", rtx_bundle, "-o", out, *RTX, "--strip-graphs", "--cache-dir", cache)
    assert ran.code == 0, ran.err
    assert not (out / "graphs").exists()
    assert run("inspect", out, "--engines").code == 0
    run("generate", out, "--labels", 1, "-o", tmp_path / "x.png").refused("stripped", "--strip-graphs")


def test_cache_lists_what_it_holds_and_prunes_it(
    run: Run,
    rtx_bundle: Path,
    cache: Path,
    tmp_path: Path,
) -> None:
    copy = Path(shutil.copytree(cache, tmp_path / "cache"))
    listed = run("cache", "ls", "--cache-dir", copy)
    assert listed.code == 0
    assert f"{len(list((copy / 'entries').iterdir()))} builds" in listed.out
    assert "removed 0" in run("cache", "prune", "--days", 1, "--cache-dir", copy).out
    assert run("cache", "prune", "--all", "--cache-dir", copy).code == 0
    assert "0 builds" in run("cache", "ls", "--cache-dir", copy).out


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--gpu", "sm89"), "--gpu is about engines"),
        (("--hardware-compat",), "--hardware-compat is about engines"),
        (("--strip-graphs",), "--strip-graphs would leave nothing"),
        (("--target", "tensorrt-rtx"), "--gpu sm89,sm120"),
        (("--target", "tensorrt-rtx", "--gpu", "hopper"), "GPU 'hopper' is not an architecture"),
        (("--target", "tensorrt-rtx", "--gpu", "sm90"), "sm90"),
        (("--target", "tensorrt-rtx", "--gpu", "sm75", "--precision", "bf16"), "sm75 has no bf16"),
        (("--target", "tensorrt-rtx", "--gpu", "sm80", "--precision", "fp8"), "sm80 has no fp8"),
        (("--target", "tensorrt"), "pip install 'ilf-trt[tensorrt]'"),
        ((*RTX, "--builder-level", "9"), "--builder-level is 9"),
        ((*RTX, "--workspace", "0"), "--workspace is 0"),
        (("--fp8-exclude", "*"), "--precision fp8"),
        (("--precision", "fp8", "--fp8-exclude", "no.such"), "--fp8-exclude 'no.such' matches no Linear"),
        (("--hoist-text",), "takes no text"),
    ],
)
def test_build_refuses_it_in_one_line(
    run: Run,
    checkpoint: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    part: str,
) -> None:
    run("build", "--checkpoint", checkpoint, "-o", tmp_path / "x.ilf", *options).refused(part)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ((), "compile needs --target"),
        (("--target", "tensorrt-rtx"), "--gpu sm89,sm120"),
        (("--target", "onnx"), "--target"),
    ],
)
def test_compile_refuses_it_in_one_line(run: Run, dit_bundle: Path, options: tuple[str, ...], part: str) -> None:
    run("compile", dit_bundle, *options).refused(part)


@pytest.mark.parametrize("options", [(), ("--all", "--days", 3), ("--days", -1), ("--max-gib", "nan")])
def test_prune_refuses_what_does_not_say_what_to_remove(
    run: Run,
    tmp_path: Path,
    options: tuple[object, ...],
) -> None:
    run("cache", "prune", *options, "--cache-dir", tmp_path).refused("--")


@pytest.mark.slow
def test_fp8_engines_hold_the_linears_that_were_not_left_out(
    run: Run,
    checkpoint: Path,
    cache: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "fp8.ilf"
    options = (*QUICK, "--precision", "fp8", "--fp8-exclude", "*.to_out.0", *RTX, "--cache-dir", cache)
    assert run("build", "--checkpoint", checkpoint, "-o", out, *options).code == 0
    manifest = Bundle.open(out).manifest
    assert manifest.fp8 is not None
    for report in run("inspect", out, "--engines", "--json").data:
        chosen = {name for name in manifest.fp8.amax if manifest.spec.graph_of_linear(name) == report["graph"]}
        in_fp8 = {name for kernel in report["kernels"] if kernel["precision"] == "fp8" for name in kernel["layers"]}
        assert chosen == {name for name in in_fp8 if name in manifest.fp8.amax}
        assert not any(name.endswith("to_out.0") for name in in_fp8)
