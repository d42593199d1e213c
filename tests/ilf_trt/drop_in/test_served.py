"""Unchanged diffusers pipelines over a bundle's graphs beside the eager drop-in, and what a bundle refuses."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor, nn

from ilf_trt import ILFModel, load_ilf, save_ilf
from ilf_trt.assembly.conductor import BuildResult, build
from ilf_trt.assembly.options import BuildOptions
from ilf_trt.contract.plan import SCHEDULERS, Ratio, Rule
from ilf_trt.contract.spec import BatchRange, Loop
from ilf_trt.drop_in.eager import ILFTransformer
from ilf_trt.drop_in.follower import Follower, plan_maker
from ilf_trt.drop_in.served import ServedTransformer, plan_of_step
from ilf_trt.errors import InvalidRequest, UnsupportedBackbone, UnsupportedScheduler
from ilf_trt.model import backbones
from ilf_trt.runtime import Pipeline
from tests.conftest import TEXT_CHANNELS, TEXT_TOKENS
from tests.ilf_trt.drop_in.test_eager import (
    CONFIG,
    KINDS,
    STEPS,
    VISIBLE,
    fed,
    inject,
    net_of,
    pipe_of,
    plan_of,
    relative,
    run,
    tune,
)

# Another library's float32 products; measured below 4e-6 over six steps.
TRAJECTORY_ROUNDING = 1e-4
HALF_ROUNDING = 1e-2
BLOCKS, LOOP = 2, (1, 1)
ROWS = 4
PADDED = TEXT_TOKENS + 2


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint of each model with a bundle beside it; alpha and sigma are one model."""

    @cache
    def made(kind: str) -> Path:
        folder = tmp_path_factory.mktemp("served")
        save_ilf(fed(net_of(kind, BLOCKS), LOOP), folder / "checkpoint")
        DPMSolverMultistepScheduler().save_pretrained(folder / "checkpoint" / "scheduler")
        options = BuildOptions(
            guidance=False,
            batch=BatchRange(1 if kind == "alpha" else ROWS, ROWS, ROWS),  # a fixed batch is exported in half the time
            steps=STEPS,
            feedback="last:1",
            rule=Rule.UNIFORM,
            text_tokens=PADDED,
            verify=False,
        )
        build(str(folder / "checkpoint"), folder / "bundle.ilf", options)
        return folder / "checkpoint"

    return lambda kind: made("alpha" if kind == "sigma" else kind)


Case = tuple[Any, ILFModel, Path]


@pytest.fixture
def case(checkpoint_of: Callable[[str], Path]) -> Callable[..., Case]:
    """A pipeline of a kind with its own transformer, the ILF model, and the bundle."""

    def made(kind: str, config: dict[str, Any] = CONFIG) -> Case:
        checkpoint = checkpoint_of(kind)
        model = load_ilf(checkpoint)
        return pipe_of(kind, model.backbone, config), model, checkpoint.parent / "bundle.ilf"

    return made


# --- beside the eager drop-in


@pytest.mark.parametrize("kind", KINDS)
def test_a_bundle_gives_the_latents_of_the_eager_model(kind: str, case: Callable[..., Case]) -> None:
    pipe, model, bundle = case(kind)
    before = run(pipe)
    ILFTransformer.install(pipe, model, feedback="outer:2")
    wanted = run(pipe)
    with ServedTransformer.install(pipe, bundle, threads=1, feedback="outer:2", rule="anneal") as transformer:
        assert pipe.transformer is transformer
        got = run(pipe)
    assert relative(got, wanted) < TRAJECTORY_ROUNDING
    assert relative(got, before) > VISIBLE


@pytest.mark.parametrize("kind", KINDS)
def test_without_feedback_a_pipeline_gives_what_it_gave(kind: str, case: Callable[..., Case]) -> None:
    pipe, _, bundle = case(kind)
    before = run(pipe)
    with ServedTransformer.install(pipe, bundle, threads=1, feedback="none"):
        assert relative(run(pipe), before) < TRAJECTORY_ROUNDING


@pytest.mark.parametrize(("kind", "name"), [("dit", "ddim"), ("alpha", "euler"), ("sigma", "ddim")])
def test_the_pipelines_own_scheduler_is_followed(kind: str, name: str, case: Callable[..., Case]) -> None:
    pipe, model, bundle = case(kind, SCHEDULERS[name])
    ILFTransformer.install(pipe, model, feedback="all")
    wanted = run(pipe)
    with ServedTransformer.install(pipe, bundle, threads=1, feedback="all", rule="anneal"):
        assert relative(run(pipe), wanted) < TRAJECTORY_ROUNDING


def test_the_plan_is_the_bundles_own_and_made_again_for_every_call(case: Callable[..., Case]) -> None:
    pipe, model, bundle = case("alpha")
    eager = pipe_of("alpha", model.backbone)
    ILFTransformer.install(eager, model, feedback="last:1", rule="uniform")
    with ServedTransformer.install(pipe, bundle, threads=1):
        for steps, guidance_scale in ((STEPS, 3.0), (3, 1.0), (STEPS, 3.0)):
            options = {"steps": steps, "guidance_scale": guidance_scale}
            assert relative(run(pipe, **options), run(eager, **options)) < TRAJECTORY_ROUNDING


def test_a_pipeline_may_be_loaded_without_a_transformer(case: Callable[..., Case]) -> None:
    pipe, _, bundle = case("alpha")
    empty = pipe_of("alpha", None)
    with (
        ServedTransformer.install(empty, bundle, threads=1) as served,
        ServedTransformer.install(pipe, bundle, threads=1) as other,
    ):
        assert (served.config, served.dtype, served.device) == (other.config, other.dtype, other.device)
        assert torch.equal(run(empty), run(pipe))


# --- what a pipeline sees


@pytest.mark.parametrize("kind", KINDS)
def test_it_has_no_learned_variance_and_says_so(kind: str, case: Callable[..., Case]) -> None:
    pipe, model, bundle = case(kind)
    with ServedTransformer.install(pipe, bundle, threads=1) as transformer:
        seen: list[Tensor] = []
        transformer.register_forward_hook(lambda _, __, output: seen.append(output[0]))
        run(pipe, 2)
    channels = model.backbone.config.in_channels
    assert {output.shape[1] for output in seen} == {transformer.config.out_channels} == {channels}
    assert transformer.config.sample_size == model.backbone.config.sample_size
    assert (transformer.dtype, transformer.device) == (torch.float32, torch.device("cpu"))
    assert list(transformer.parameters()) == []


def test_latents_and_text_in_half_precision_are_widened_and_narrowed(case: Callable[..., Case]) -> None:
    pipe, _, bundle = case("alpha")
    with ServedTransformer.install(pipe, bundle, threads=1) as transformer:
        wanted = run(pipe, 2)
        transformer.dtype = torch.bfloat16  # as where the text encoder's is
        got = run(pipe, 2)
    assert got.dtype == torch.bfloat16
    assert relative(got.float(), wanted) < 10 * HALF_ROUNDING


def test_a_condition_is_fetched_once_a_run(case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, _, bundle = case("sized alpha")
    with ServedTransformer.install(pipe, bundle, threads=1) as transformer:
        fetched: list[dict[str, Any]] = []
        generate = transformer._served.generate
        monkeypatch.setattr(transformer._served, "generate", lambda **given: fetched.append(given) or generate(**given))
        for _ in range(2):
            run(pipe)
    for name in ("text", "text_mask", "resolution", "aspect_ratio"):
        arrays = [given[name] for given in fetched]
        assert [id(array) for array in arrays] == [id(arrays[0])] * STEPS + [id(arrays[-1])] * STEPS
        assert arrays[0] is not arrays[-1]


def test_a_step_is_a_plan_of_one_step_that_ends_at_the_models_output() -> None:
    plan = plan_of(fed(net_of("dit")), feedback="1")
    for index, step in enumerate(plan.steps):
        alone = plan_of_step(plan, index)
        assert alone.initial_scale == 1
        assert alone.steps == (replace(step, solver=(0, 1, 0, 1, 0, 0)),)
        assert alone.feedback == ("all" if index == 1 else "none")


def test_a_bundle_can_take_the_place_of_another_and_an_eager_model_its(case: Callable[..., Case]) -> None:
    pipe, model, bundle = case("dit")
    with ServedTransformer.install(pipe, bundle, threads=1), ServedTransformer.install(pipe, bundle, threads=1):
        got = run(pipe, 3)
    ILFTransformer.install(pipe, model, feedback="last:1", rule="uniform")
    assert relative(got, run(pipe, 3)) < TRAJECTORY_ROUNDING


# --- on a GPU: what is handed over, on a stand-in


class OnGpu(Tensor):
    """A tensor that says that it lies on a GPU."""

    @property
    def is_cuda(self) -> bool:
        return True


class Recorder:
    """In the place of a loaded bundle on a GPU; gives back twice the latents by DLPack."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.manifest, self.bundle = pipeline.manifest, pipeline.bundle
        self.given: dict[str, Any] = {}

    def generate(self, **given: Any) -> Any:
        self.given = given
        return SimpleNamespace(latents=2 * given["latents"].as_subclass(Tensor))


def test_on_a_gpu_latents_stay_there(case: Callable[..., Case]) -> None:
    pipe, _, bundle = case("dit")
    with Pipeline.load(bundle, threads=1) as loaded:
        served = Recorder(loaded)
        follower = Follower(pipe, plan_maker(BLOCKS, Loop(*LOOP), "all", Rule.ANNEAL, Ratio.LOOP_TO_MODEL))
        transformer = ServedTransformer(served, follower, device="cuda:0")
    pipe.scheduler.set_timesteps(STEPS)
    latents = torch.randn(1, 2, 8, 8)[:, ::2].half().as_subclass(OnGpu)
    got = transformer(latents, timestep=torch.tensor([999]), class_labels=torch.tensor([3]), return_dict=False)[0]
    given = served.given
    assert given["on_device"]
    assert (given["latents"].dtype, given["latents"].is_contiguous()) == (torch.float32, True)
    assert given["class_labels"].tolist() == [3]
    assert got.dtype == torch.float16
    assert torch.equal(got, 2 * latents.as_subclass(Tensor))


# --- refusals


def test_a_bundle_that_guides_a_fixed_batch_is_refused_and_closed(
    whole_loop_build: BuildResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[Pipeline] = []
    close = Pipeline.close
    monkeypatch.setattr(Pipeline, "close", lambda pipeline: closed.append(pipeline) or close(pipeline))
    pipe = pipe_of("alpha", None)
    with pytest.raises(InvalidRequest, match="guides a fixed batch of 1, the diffusers pipeline guides itself; build"):
        ServedTransformer.install(pipe, whole_loop_build.bundle.path, threads=1)
    assert len(closed) == 1
    assert pipe.transformer is None


def test_a_bundle_of_another_model_is_refused(case: Callable[..., Case]) -> None:
    _, _, bundle = case("dit")
    pipe = pipe_of("alpha", net_of("alpha"))
    with pytest.raises(InvalidRequest, match="PixArtAlphaPipeline is no pipeline of a dit; give DiTPipeline"):
        ServedTransformer.install(pipe, bundle, threads=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_pipeline_of_the_base_is_known_in_every_dtype(dtype: torch.dtype, case: Callable[..., Case]) -> None:
    pipe, _, bundle = case("dit")
    pipe.transformer = nn.Module.to(pipe.transformer, dtype)
    with ServedTransformer.install(pipe, bundle, threads=1) as transformer:
        assert pipe.transformer is transformer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fine_tuned_pipeline_is_refused(dtype: torch.dtype, case: Callable[..., Case]) -> None:
    pipe, _, bundle = case("dit")
    tuned = pipe.transformer = nn.Module.to(tune(pipe.transformer), dtype)
    with pytest.raises(InvalidRequest, match="other weights than the bundle's base; build a bundle of it with --pipel"):
        ServedTransformer.install(pipe, bundle, threads=1)
    assert pipe.transformer is tuned


def test_a_pipeline_with_a_lora_is_refused(case: Callable[..., Case]) -> None:
    pipe, _, bundle = case("dit")
    inject(pipe.transformer)
    with pytest.raises(InvalidRequest, match="the pipeline's transformer has an adapter"):
        ServedTransformer.install(pipe, bundle, threads=1)


def test_a_drop_in_of_another_base_is_no_base_either(case: Callable[..., Case]) -> None:
    pipe, _, bundle = case("dit")
    other = pipe_of("dit", None)
    ILFTransformer.install(other, fed(tune(net_of("dit", BLOCKS)), LOOP))
    with pytest.raises(InvalidRequest, match="other weights than the bundle's base"):
        ServedTransformer.install(other, bundle, threads=1)
    with (
        ServedTransformer.install(pipe, bundle, threads=1),
        pytest.raises(InvalidRequest, match="it serves a bundle of another base"),
    ):
        ILFTransformer.install(pipe, fed(tune(net_of("dit", BLOCKS)), LOOP))


def test_a_pipeline_is_not_saved_without_its_transformer(case: Callable[..., Case], tmp_path: Path) -> None:
    pipe, _, bundle = case("dit")
    with (
        ServedTransformer.install(pipe, bundle, threads=1) as transformer,
        pytest.raises(InvalidRequest, match="a served transformer has no weights to save; put the pipeline's own"),
    ):
        transformer.save_pretrained(tmp_path)
    pipe = pipe_of("alpha", None)
    _, _, bundle = case("alpha")
    with (
        ServedTransformer.install(pipe, bundle, threads=1),
        pytest.raises(InvalidRequest, match="a served transformer has no weights to save"),
    ):
        pipe.save_pretrained(tmp_path)


def test_a_closed_bundle_is_refused(case: Callable[..., Case]) -> None:
    pipe, _, bundle = case("dit")
    ServedTransformer.install(pipe, bundle, threads=1).close()
    with pytest.raises(InvalidRequest, match="this pipeline is closed"):
        run(pipe)


def test_more_rows_than_the_bundle_takes_run_in_turns(case: Callable[..., Case]) -> None:
    pipe, _, bundle = case("alpha")
    with ServedTransformer.install(pipe, bundle, threads=1):
        assert run(pipe, num_images_per_prompt=2).shape[0] == 2 * run(pipe).shape[0]


def test_a_scheduler_without_a_plan_is_refused_by_name(case: Callable[..., Case]) -> None:
    pipe, _, bundle = case("dit", {"_class_name": "DDIMScheduler"})
    with (
        ServedTransformer.install(pipe, bundle, threads=1),
        pytest.raises(UnsupportedScheduler, match="DDIMScheduler: clip_sample is True"),
    ):
        run(pipe)


def test_a_bundle_of_a_backbone_that_is_not_registered_is_refused_when_it_is_installed(
    monkeypatch: pytest.MonkeyPatch, case: Callable[..., Case]
) -> None:
    pipe, _, bundle = case("dit")
    net = pipe.transformer
    monkeypatch.setattr(backbones, "adapters", lambda: ())
    with pytest.raises(UnsupportedBackbone, match="no adapter for backbone kind 'dit'"):
        ServedTransformer.install(pipe, bundle, threads=1)
    assert pipe.transformer is net


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_hidden_states": torch.zeros(ROWS, PADDED + 1, TEXT_CHANNELS)}, r"^text has shape \(4, 10, 32\)"),
        ({"encoder_hidden_states": None}, "^'text' is missing; this bundle takes text, text_mask, resolution, aspect"),
        ({"encoder_attention_mask": torch.zeros(ROWS, 1, TEXT_TOKENS)}, r"^text_mask is \(4, 1, 7\), its text is"),
        ({"attention_mask": torch.ones(1)}, "^'attention_mask' is not supported by a served transformer; leave it out"),
        ({"class_labels": torch.tensor([1])}, "^'class_labels' is not supported by a served transformer; leave it out"),
        ({"timestep": torch.tensor([5])}, "^no step is at time 5; the plan's are 999, 832, 666, …, 166$"),
    ],
    ids=["long text", "no text", "bias as mask", "mask of the latent", "labels", "timestep"],
)
def test_what_a_bundle_does_not_take_is_refused(
    change: dict[str, Any], message: str, case: Callable[..., Case]
) -> None:
    pipe, _, bundle = case("sized alpha")
    pipe.scheduler.set_timesteps(STEPS)
    latents = torch.zeros(ROWS, 4, 128, 128)
    arguments = {
        "timestep": torch.tensor([999]),
        "encoder_hidden_states": torch.zeros(ROWS, TEXT_TOKENS, TEXT_CHANNELS),
        "added_cond_kwargs": {"resolution": torch.full((ROWS, 2), 1024.0), "aspect_ratio": torch.ones(ROWS, 1)},
    }
    with ServedTransformer.install(pipe, bundle, threads=1) as transformer:
        assert transformer(latents, **arguments).sample.shape == latents.shape
        with pytest.raises(InvalidRequest, match=message):
            transformer(latents, **{**arguments, **change})
