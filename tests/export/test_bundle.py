"""What an export leaves to train again and what it makes once a picture: constants and hoisted text."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from ilf_trt import load_ilf, save_ilf
from ilf_trt.assembly.conductor import BuildResult, build
from ilf_trt.assembly.options import BuildOptions
from ilf_trt.contract.bundle import Bundle, graph_file
from ilf_trt.contract.ports import GRAPHS
from ilf_trt.contract.spec import BatchRange, Precision
from ilf_trt.errors import InvalidRequest
from ilf_trt.runtime import Pipeline
from tests.conftest import TEXT_CHANNELS, TEXT_TOKENS, train_again

PICTURES = 2
# The same products in the same precision, made in another graph; measured below 1e-6 over four steps.
FLOAT32_ROUNDING = 1e-5
TEXT_PROJECTIONS = ("attn2.to_k.weight", "attn2.to_v.weight")


def retrained(checkpoint: Path, folder: Path) -> Path:
    """The same base with another feedback block and other scales."""
    model = load_ilf(checkpoint)
    train_again(model)
    save_ilf(model, folder)
    shutil.copytree(checkpoint / "scheduler", folder / "scheduler")
    return folder


def differing(one: Bundle, other: Bundle) -> set[str]:
    """Files of a bundle whose bytes are not those of the other's."""
    assert one.manifest.files.keys() == other.manifest.files.keys()
    return {name for name, facts in one.manifest.files.items() if facts != other.manifest.files[name]}


def options_of(built: BuildResult, **changes: Any) -> BuildOptions:
    """What `built` was built with."""
    manifest = built.bundle.manifest
    options = BuildOptions(
        precision=manifest.precision,
        batch=manifest.batch,
        guidance=manifest.spec.guidance,
        guidance_scale=manifest.guidance_scale,
        steps=manifest.plan.requested_steps,
        feedback=manifest.plan.feedback,
        hoist_text=bool(manifest.spec.per_block),
        text_tokens=TEXT_TOKENS,
    )
    return replace(options, **changes)


@pytest.fixture(scope="module")
def hoisted_build(
    pixart_build: BuildResult, pixart_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> BuildResult:
    """`pixart_build` with the text hoisted."""
    folder = tmp_path_factory.mktemp("hoisted")
    shutil.copytree(pixart_checkpoint, folder / "checkpoint")
    return build(str(folder / "checkpoint"), folder / "hoisted.ilf", options_of(pixart_build, hoist_text=True))


@pytest.fixture(scope="module")
def half_hoisted_build(whole_loop_build: BuildResult, tmp_path_factory: pytest.TempPathFactory) -> BuildResult:
    """`whole_loop_build` (no micro-conditions) in FP16 with the text hoisted."""
    folder = tmp_path_factory.mktemp("half_hoisted")
    shutil.copytree(whole_loop_build.bundle.path.parent / "checkpoint", folder / "checkpoint")
    options = options_of(whole_loop_build, hoist_text=True, precision=Precision.FP16)
    return build(str(folder / "checkpoint"), folder / "hoisted.ilf", options)


@pytest.fixture(scope="module")
def retrained_dit(
    dit_build: BuildResult, dit_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> BuildResult:
    folder = tmp_path_factory.mktemp("retrained_dit")
    checkpoint = retrained(dit_checkpoint, folder / "checkpoint")
    return build(str(checkpoint), folder / "retrained.ilf", options_of(dit_build))


@pytest.fixture(scope="module")
def retrained_pixart(half_hoisted_build: BuildResult, tmp_path_factory: pytest.TempPathFactory) -> BuildResult:
    folder = tmp_path_factory.mktemp("retrained_pixart")
    checkpoint = retrained(half_hoisted_build.bundle.path.parent / "checkpoint", folder / "checkpoint")
    return build(str(checkpoint), folder / "retrained.ilf", options_of(half_hoisted_build))


PAIRS = (("dit_build", "retrained_dit"), ("half_hoisted_build", "retrained_pixart"))


@pytest.fixture(params=PAIRS, ids=["dit fp32", "pixart fp16 hoisted"])
def pair(request: pytest.FixtureRequest) -> tuple[BuildResult, BuildResult]:
    """A build, and that of the checkpoint trained again."""
    before, after = (request.getfixturevalue(name) for name in request.param)
    return before, after


# --- a feedback block trained again


def test_a_feedback_block_trained_again_changes_no_graph_but_its_own(pair: tuple[BuildResult, BuildResult]) -> None:
    before, after = (built.bundle for built in pair)
    changed = differing(before, after)
    assert {name.partition(".onnx")[0] for name in changed if name.startswith("graphs/")} == {"graphs/loop_feedback"}
    assert changed - {name for name in changed if name.startswith("graphs/")} == {"constants.npz", "reference.npz"}
    assert before.manifest.scales != after.manifest.scales


def test_a_feedback_block_trained_again_is_verified_like_the_first(pair: tuple[BuildResult, BuildResult]) -> None:
    limit = pair[1].bundle.manifest.precision.parity_limit
    assert {row.what: row.relative for row in pair[1].differences if not row.relative <= limit} == {}


def test_an_old_bundle_serves_a_new_block_by_two_files_and_the_scales(
    pair: tuple[BuildResult, BuildResult], tmp_path: Path
) -> None:
    before, after = (built.bundle for built in pair)
    new = tmp_path / "new.ilf"
    shutil.copytree(before.path, new)
    for name in differing(before, after) | {"manifest.json"}:
        shutil.copyfile(after.path / name, new / name)
    assert Bundle.open(new).manifest == after.manifest


def test_constants_are_of_the_feedback_block_and_in_the_dtype_of_the_graphs(
    pair: tuple[BuildResult, BuildResult],
) -> None:
    for built in pair:
        bundle = built.bundle
        weights = dict(load_ilf(bundle.path.parent / "checkpoint").feedback.block.named_parameters())
        constants = bundle.constants()
        assert constants.keys() == {port.name for port in bundle.manifest.spec.constants} != set()
        for name, array in constants.items():
            wanted = weights[name.removeprefix("feedback.")].detach().numpy()
            np.testing.assert_array_equal(array, wanted.astype(bundle.manifest.precision.array_dtype), err_msg=name)


def test_a_model_whose_cond_needs_nothing_of_the_feedback_block_has_no_constants(pixart_build: BuildResult) -> None:
    bundle = pixart_build.bundle
    assert bundle.manifest.spec.constants == ()
    assert bundle.constants() == {}
    assert "constants.npz" not in bundle.manifest.files


# --- hoisted text


def conditions(bundle: Bundle, pictures: int) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(1)
    text = (pictures, TEXT_TOKENS, TEXT_CHANNELS)
    values: dict[str, NDArray[Any]] = {
        "text": rng.standard_normal(text, np.float32),
        "text_mask": np.broadcast_to(np.arange(TEXT_TOKENS) < 4, text[:2]).astype(np.float32),
        "negative_text": rng.standard_normal(text, np.float32),
        "negative_text_mask": np.broadcast_to(np.arange(TEXT_TOKENS) < 2, text[:2]).astype(np.float32),
        "resolution": np.full((pictures, 2), 128, np.float32),
        "aspect_ratio": np.ones((pictures, 1), np.float32),
    }
    return {port.name: values[port.name] for port in bundle.manifest.spec.conditions}


def latents(built: BuildResult, pictures: int) -> NDArray[np.float32]:
    with Pipeline.load(built.bundle.path, threads=1) as pipeline:
        return pipeline.generate(seed=3, guidance_scale=2.0, **conditions(built.bundle, pictures)).latents


def relative(got: NDArray[Any], wanted: NDArray[Any]) -> float:
    assert got.shape == wanted.shape
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


@pytest.fixture(params=["hoisted_build", "half_hoisted_build"])
def hoisted(request: pytest.FixtureRequest) -> BuildResult:
    built: BuildResult = request.getfixturevalue(request.param)
    return built


def test_hoisted_text_is_verified_in_the_limit_of_the_precision(hoisted: BuildResult) -> None:
    limit = hoisted.bundle.manifest.precision.parity_limit
    assert {row.what: row.relative for row in hoisted.differences if not row.relative <= limit} == {}
    assert any("text_pairs" in row.what for row in hoisted.differences)


def test_hoisted_text_gives_the_latents_of_text_in_every_block(
    hoisted_build: BuildResult, pixart_build: BuildResult
) -> None:
    assert relative(latents(hoisted_build, PICTURES), latents(pixart_build, PICTURES)) < FLOAT32_ROUNDING


def test_hoisted_text_without_micro_conditions_gives_the_latents_of_text_in_every_block(
    half_hoisted_build: BuildResult, whole_loop_build: BuildResult
) -> None:
    difference = relative(latents(half_hoisted_build, 1), latents(whole_loop_build, 1))
    assert difference < Precision.FP16.parity_limit


def test_every_graph_with_blocks_takes_their_pairs_instead_of_the_text(hoisted_build: BuildResult) -> None:
    for graph in hoisted_build.bundle.manifest.graphs:
        names = {port.name for port in graph.inputs}
        assert "text_tokens" not in names
        if graph.name != "cond":
            assert {name for name in names if name.startswith("text_pairs")} == {f"text_pairs_{graph.name}"}


def stored(bundle: Bundle, graph: str) -> set[bytes]:
    """The values of every weight of a graph, in an order that does not change when the exporter transposes it."""
    model = onnx.load(bundle.path / graph_file(graph))
    return {np.sort(numpy_helper.to_array(tensor), axis=None).tobytes() for tensor in model.graph.initializer}


def test_text_projections_of_the_backbone_live_in_cond_alone_and_the_feedback_blocks_are_constants(
    hoisted: BuildResult,
) -> None:
    bundle = hoisted.bundle
    weights = load_ilf(bundle.path.parent / "checkpoint").state_dict()
    projections = {name: value.numpy() for name, value in weights.items() if name.endswith(TEXT_PROJECTIONS)}
    dtype = bundle.manifest.precision.array_dtype
    keys = {name: np.sort(array.astype(dtype), axis=None).tobytes() for name, array in projections.items()}
    values = {graph: stored(bundle, graph) for graph in GRAPHS}
    held = {graph: {name for name, key in keys.items() if key in values[graph]} for graph in GRAPHS}
    of_backbone = {name for name in projections if not name.startswith("feedback.")}
    assert held == {graph: of_backbone if graph == "cond" else set() for graph in GRAPHS}
    assert {f"feedback.{name}" for name in TEXT_PROJECTIONS} <= bundle.constants().keys()


def test_a_model_without_text_cannot_hoist_it_and_leaves_nothing(dit_checkpoint: Path, tmp_path: Path) -> None:
    options = BuildOptions(hoist_text=True, batch=BatchRange(1, 1, 1), steps=2, feedback="none")
    with pytest.raises(InvalidRequest, match=r"^DiTTransformer2DModel takes no text; leave --hoist-text out$"):
        build(str(dit_checkpoint), tmp_path / "dit.ilf", options)
    assert list(tmp_path.iterdir()) == []
