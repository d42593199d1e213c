"""A new backbone is one file: toys that no file of the product names are trained, exported, built, served, planned."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ilf_trt import attach, load_ilf, save_ilf
from ilf_trt.assembly.conductor import BuildResult, build
from ilf_trt.assembly.options import BuildOptions
from ilf_trt.contract.plan import SCHEDULERS
from ilf_trt.contract.spec import BatchRange, Precision
from ilf_trt.errors import InvalidRequest, UnsupportedBackbone
from ilf_trt.model.backbones import adapter_of_kind, register
from ilf_trt.model.sampling import sample
from ilf_trt.runtime import Pipeline
from ilf_trt.train.batch_stream import Batch, MemoryStream
from ilf_trt.train.recipe import LossKind
from tests.conftest import Run
from tests.runtime import conftest as gpus
from tests.small_training import run_training, small_recipe
from tests.toys import CHANNELS, SIDE, TEXT_TOKENS, TOYS, Toy, TwoStreams, conditions, registered, toy_model

machine, compiled = gpus.machine, gpus.compiled

ROOT = Path(__file__).parent.parent
LOOP = (1, 2)
EXACT = 1e-5  # float32 sums in another order
GUIDANCE = 2.0
STEPS = 3


def of_noise(pictures: int = 2) -> torch.Tensor:
    return torch.randn(pictures, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module", params=TOYS, ids=lambda adapter: adapter.kind)
def adapter(request: pytest.FixtureRequest) -> Iterator[type[Toy]]:
    with registered(request.param):
        yield request.param


@pytest.fixture(scope="module")
def model(adapter: type[Toy]) -> Any:
    """With feedback that shows: scales and block are not those of the start."""
    model = attach(toy_model(adapter), LOOP)
    torch.manual_seed(8)
    with torch.no_grad():
        model.feedback.scales.copy_(torch.tensor([0.2, -0.1]))
        for parameter in model.feedback.block.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def built(adapter: type[Toy], model: Any, tmp_path_factory: pytest.TempPathFactory) -> BuildResult:
    folder = tmp_path_factory.mktemp(adapter.kind)
    save_ilf(model, folder / "checkpoint")
    options = BuildOptions(
        steps=STEPS, feedback="outer:1", text_tokens=TEXT_TOKENS, batch=BatchRange(1, 2, 4), guidance_scale=GUIDANCE
    )
    return build(str(folder / "checkpoint"), folder / "toy.ilf", options)


def test_without_feedback_it_is_the_plain_model(adapter: type[Toy]) -> None:
    plain = toy_model(adapter)
    model = attach(plain, LOOP)
    rows = {name: torch.from_numpy(value) for name, value in conditions(adapter(plain), 2).items()}
    call, noise, times = model.adapter.call(rows), of_noise(), torch.tensor([700.0, 20.0])
    wanted = plain(noise, timestep=times, **call).sample
    for feedback in (False, True):  # the scales are zero
        torch.testing.assert_close(model(noise, timestep=times, feedback=feedback, **call).sample, wanted)


def test_every_stream_gets_its_feedback(model: Any) -> None:
    call = model.adapter.call({n: torch.from_numpy(v) for n, v in conditions(model.adapter, 1).items()})
    first = model.first_pass(of_noise(1), torch.tensor([500.0]), model.adapter.context(call))
    ones = tuple(torch.ones_like(tokens) for tokens in first.hidden)
    blocks = list(model.adapter.blocks)[1:2]
    for stream in range(len(ones)):
        feedback = tuple(one if index == stream else 0 * one for index, one in enumerate(ones))
        changed, plain = (
            model.adapter.run(
                blocks, first.hidden, first.modulation, first.context, feedback=feedback, scales=torch.tensor([scale])
            )
            for scale in (0.5, 0.0)
        )
        assert not torch.equal(changed[stream], plain[stream])
    assert len(ones) == 1 + len(model.adapter.side_streams(TEXT_TOKENS))


def test_a_checkpoint_comes_back(adapter: type[Toy], model: Any, tmp_path: Path) -> None:
    save_ilf(model, tmp_path / "checkpoint")
    again = load_ilf(tmp_path / "checkpoint")
    assert isinstance(again.adapter, adapter)
    assert torch.equal(again.feedback.scales, model.feedback.scales)


@pytest.mark.parametrize("kind", LossKind)
def test_it_trains(kind: LossKind, adapter: type[Toy], tmp_path: Path) -> None:
    model = attach(toy_model(adapter), LOOP)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    values = {name: torch.from_numpy(value) for name, value in conditions(model.adapter, 4).items()}
    rows = Batch(
        of_noise(4), {port.name: values[port.name] for port in model.adapter.conditioning(TEXT_TOKENS).positive}
    )
    second_pass = "t-i*m/n" if kind is LossKind.INTERVAL else "t"
    recipe = small_recipe(
        loss={"kind": str(kind), "second_pass": second_pass, "condition_dropout": 0.0, "teacher_steps": 2},
        optimisation={"iterations": 1, "batch_size": 4},
        logging={"every": 1},
    )
    training = run_training(tmp_path, recipe, model=model, stream=MemoryStream(rows, global_batch=4, seed=0))
    assert training.losses[1] > 0
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved
    assert all(name.startswith("feedback.") for name in moved)


def test_the_build_verifies_every_graph_and_a_trajectory(built: BuildResult) -> None:
    assert {row.what for row in built.differences} >= {"trajectory", "cond modulation", "post prediction"}
    assert max(row.relative for row in built.differences) < EXACT


def test_the_loop_carries_every_stream(adapter: type[Toy], built: BuildResult) -> None:
    graphs = {graph.name: graph for graph in built.bundle.manifest.graphs}
    streams = ("", "_text") if adapter is TwoStreams else ("",)
    inputs = {port.name for port in graphs["loop_body"].inputs}
    assert {f"{what}{stream}" for what in ("hidden", "feedback") for stream in streams} <= inputs
    assert [port.name for port in graphs["loop_body"].outputs] == [f"features{stream}" for stream in streams]


def test_served_latents_are_those_of_torch(adapter: type[Toy], model: Any, built: BuildResult) -> None:
    values, noise = conditions(model.adapter, 2), of_noise()
    wanted = sample(
        model,
        built.bundle.manifest.plan,
        SCHEDULERS["dpmsolver++"],
        {name: torch.from_numpy(value) for name, value in values.items()},
        noise,
        guidance_scale=GUIDANCE,
    )
    with Pipeline.load(built.bundle.path) as pipe:
        got = pipe.generate(latents=noise.numpy(), **values).latents
        plain = pipe.generate(latents=noise.numpy(), plan=pipe.plan(feedback="none"), **values).latents
        unguided = pipe.generate(latents=noise.numpy(), guidance_scale=1, **values).latents
    np.testing.assert_allclose(got, wanted.numpy(), atol=EXACT * np.abs(wanted.numpy()).max())
    assert np.abs(plain - got).max() > 100 * EXACT  # feedback shows
    assert np.abs(unguided - got).max() > 100 * EXACT


@pytest.mark.parametrize("engine", ["tensorrt", "onnxruntime"])
def test_a_gpu_gives_the_latents_of_the_cpu(
    engine: str, model: Any, built: BuildResult, machine: gpus.Machine, compiled: gpus.Compiled
) -> None:
    values, noise = conditions(model.adapter, 2), of_noise().numpy()
    bundle = built.bundle.path if engine == "onnxruntime" else compiled(built.bundle.path, engine)
    with Pipeline.load(built.bundle.path) as pipe:
        wanted = pipe.generate(latents=noise, **values).latents
    with Pipeline.load(bundle, device="cuda:0", engine=engine) as pipe:
        got = pipe.generate(latents=noise, **values).latents
    np.testing.assert_allclose(got, wanted, atol=EXACT * np.abs(wanted).max())


def test_it_is_warmed_up_planned_and_inspected(built: BuildResult, run: Run) -> None:
    with Pipeline.load(built.bundle.path, sessions=1) as pipe:
        pipe.warm_up(1)
        plan = pipe.plan(4, feedback="all")
    assert [step.feedback for step in plan.steps] == [True] * 4
    assert plan.block_forwards == 4 * (4 + 2 + 1)
    assert run("inspect", built.bundle.path).code == 0


@pytest.mark.parametrize("adapter", [TwoStreams], indirect=True)
def test_it_is_built_in_fp8(model: Any, built: BuildResult, tmp_path: Path) -> None:
    calibration = tmp_path / "conditions.npz"
    np.savez(calibration, **conditions(model.adapter, 3))
    options = BuildOptions(
        steps=STEPS,
        feedback="outer:1",
        text_tokens=TEXT_TOKENS,
        precision=Precision.FP8,
        calibration=calibration,
    )
    result = build(str(built.bundle.path.parent / "checkpoint"), tmp_path / "toy.ilf", options)
    assert max(row.relative for row in result.differences) <= Precision.FP8.parity_limit


def test_no_file_of_the_product_names_a_toy() -> None:
    for folder in ("ilf_trt", "export", "engines", "runtime"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not any(toy.__name__ in path.read_text().split() for toy in TOYS), path


def test_an_adapter_is_known_while_it_is_registered() -> None:
    with registered(Toy), pytest.raises(InvalidRequest, match="give Toy another kind and class"):
        register(Toy)
    with pytest.raises(UnsupportedBackbone, match="no adapter for backbone kind 'toy'"):
        adapter_of_kind("toy")
