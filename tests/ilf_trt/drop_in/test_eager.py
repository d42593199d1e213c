"""Unchanged diffusers pipelines with feedback beside the reference, and what the drop-in refuses."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import diffusers
import pytest
import torch
from diffusers import DiTPipeline, PixArtAlphaPipeline, PixArtSigmaPipeline
from torch import Tensor, nn

from ilf_trt import ILFModel, attach, load_ilf
from ilf_trt.contract.plan import SCHEDULERS, Ratio, Rule, StepPlan, make_plan
from ilf_trt.contract.spec import Loop
from ilf_trt.drop_in.eager import ILFTransformer
from ilf_trt.drop_in.follower import Follower, plan_maker
from ilf_trt.errors import InvalidRequest, UnsupportedScheduler
from ilf_trt.model.checkpoint import fingerprint
from ilf_trt.model.sampling import sample, scheduler_of
from tests.conftest import BLOCKS, LOOP, TEXT_CHANNELS, TEXT_TOKENS, small_dit, small_pixart

KINDS = ("dit", "alpha", "sized alpha", "sigma")
PICTURES = 2
STEPS = 6
GUIDANCE = 3.0
CLASSES = 1000  # DiTPipeline's null class is 1000 whatever the model
LABELS = (3, 207)
SCALES = (0.4, -0.3)
CONFIG = SCHEDULERS["dpmsolver++"]
# The same products, with the two halves of guidance the other way round; measured below 2e-7 over six steps.
TRAJECTORY_ROUNDING = 1e-5
# What feedback changes is thousands of times larger: measured 5e-2 and more.
VISIBLE = 1e-2
# The last four of eight times are 0: the levels go on falling below the smallest of training.
REPEATED = {**CONFIG, "use_exponential_sigmas": True, "sigma_min": 1e-5}


class Latents(nn.Module):
    """In the place of a VAE: its pictures are a hundredth of the latents, so that DiTPipeline clips none of them."""

    config = SimpleNamespace(scaling_factor=100.0)
    dtype, device = torch.float32, torch.device("cpu")

    def decode(self, latents: Tensor) -> Any:
        return SimpleNamespace(sample=latents)


def net_of(kind: str, blocks: int = BLOCKS) -> Any:
    """DiT 8x8; PixArt of 64 tokens; alpha's pipeline passes sizes to models of sample_size 128 alone."""
    if kind == "dit":
        return small_dit(num_embeds_ada_norm=CLASSES, num_layers=blocks)
    if kind == "sized alpha":
        return small_pixart(sized=True, sample_size=128, patch_size=16, num_layers=blocks)
    return small_pixart(sized=False, num_layers=blocks)


def fed(net: Any, loop: tuple[int, int] = LOOP) -> ILFModel:
    """An ILF model whose feedback block is no copy and whose scales are large and differ."""
    model = attach(net, loop)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.feedback.block.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        model.feedback.scales.copy_(torch.tensor(SCALES[: model.loop.size]))
    return model


def pipe_of(kind: str, net: Any, config: dict[str, Any] = CONFIG) -> Any:
    scheduler = scheduler_of(config)
    pipe: Any
    if kind == "dit":
        pipe = DiTPipeline(transformer=net, vae=Latents(), scheduler=scheduler)
    else:
        pipeline_class = PixArtSigmaPipeline if kind == "sigma" else PixArtAlphaPipeline
        pipe = pipeline_class(tokenizer=None, text_encoder=None, vae=None, transformer=net, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def text() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(10)
    shape = (PICTURES, TEXT_TOKENS, TEXT_CHANNELS)
    return {
        "text": torch.randn(shape, generator=generator),
        "text_mask": (torch.arange(TEXT_TOKENS) < torch.tensor([[7], [4]])).long(),
        "negative_text": torch.randn(shape, generator=generator),
        "negative_text_mask": (torch.arange(TEXT_TOKENS) < 2).long().repeat(PICTURES, 1),
    }


def run(pipe: Any, steps: int = STEPS, **options: Any) -> Tensor:
    """The latents that a pipeline makes of the noise of seed 9."""
    options = {"guidance_scale": GUIDANCE, "num_inference_steps": steps, **options}
    options["generator"] = torch.Generator().manual_seed(9)
    if isinstance(pipe, DiTPipeline):
        return cast(Tensor, pipe(class_labels=list(LABELS), output_type="pt", **options).images)
    given = text()
    return cast(
        Tensor,
        pipe(
            negative_prompt=None,
            prompt_embeds=given["text"],
            prompt_attention_mask=given["text_mask"],
            negative_prompt_embeds=given["negative_text"],
            negative_prompt_attention_mask=given["negative_text_mask"],
            use_resolution_binning=False,
            output_type="latent",
            **options,
        ).images,
    )


def plan_of(model: ILFModel, steps: int = STEPS, config: dict[str, Any] = CONFIG, **options: Any) -> StepPlan:
    return make_plan(config, steps, blocks=BLOCKS, loop=model.loop, **options)


def reference(kind: str, model: ILFModel, plan: StepPlan, config: dict[str, Any] = CONFIG) -> Tensor:
    """What `run` gives, by the reference."""
    conditions = {"class_labels": torch.tensor(LABELS)} if kind == "dit" else text()
    if kind == "sized alpha":
        conditions |= {"resolution": torch.full((PICTURES, 2), 1024.0), "aspect_ratio": torch.ones(PICTURES, 1)}
    noise = torch.randn(PICTURES, *model.adapter.latent, generator=torch.Generator().manual_seed(9))
    latents = sample(model, plan, config, conditions, noise, guidance_scale=GUIDANCE)
    return (latents / Latents.config.scaling_factor / 2 + 0.5).clamp(0, 1) if kind == "dit" else latents


def relative(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    offset = wanted.mean()  # a DiT's pictures lie around 0.5, by far less than that
    return float((got - wanted).abs().max() / (wanted - offset).abs().max())


# --- unchanged pipelines


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_with_feedback_gives_the_latents_of_the_reference(kind: str) -> None:
    net = net_of(kind)
    pipe, model = pipe_of(kind, net), fed(net)
    before = run(pipe)
    transformer = ILFTransformer.install(pipe, model, feedback="outer:2")
    got = run(pipe)
    assert pipe.transformer is transformer
    assert relative(got, reference(kind, model, plan_of(model, feedback="outer:2"))) < TRAJECTORY_ROUNDING
    assert relative(got, before) > VISIBLE


@pytest.mark.parametrize("kind", KINDS)
def test_without_feedback_a_pipeline_gives_what_it_gave(kind: str) -> None:
    net = net_of(kind)
    pipe, model = pipe_of(kind, net), fed(net)
    before = run(pipe)
    ILFTransformer.install(pipe, model, feedback="none")
    assert relative(run(pipe), before) < TRAJECTORY_ROUNDING


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_without_guidance_gets_feedback_too(kind: str) -> None:
    net = net_of(kind)
    pipe = pipe_of(kind, net)
    before = run(pipe, guidance_scale=1.0)
    ILFTransformer.install(pipe, fed(net), feedback="none")
    assert relative(run(pipe, guidance_scale=1.0), before) < TRAJECTORY_ROUNDING
    ILFTransformer.install(pipe, pipe.transformer.model, feedback="all")
    assert relative(run(pipe, guidance_scale=1.0), before) > VISIBLE


@pytest.mark.parametrize(
    ("kind", "name"), [("dit", "ddim"), ("alpha", "ddim"), ("alpha", "euler"), ("sigma", "ddim"), ("sigma", "euler")]
)
def test_the_pipelines_own_scheduler_is_followed(kind: str, name: str) -> None:
    config = SCHEDULERS[name]
    net = net_of(kind)
    pipe, model = pipe_of(kind, net, config), fed(net)
    ILFTransformer.install(pipe, model, feedback="alternate")
    wanted = reference(kind, model, plan_of(model, config=config, feedback="alternate"), config)
    assert relative(run(pipe), wanted) < TRAJECTORY_ROUNDING


@pytest.mark.parametrize(
    "settings", [{"rule": Rule.UNIFORM}, {"rule": "none"}, {"rule": "rescale", "ratio": "n/m"}], ids=str
)
def test_rule_and_ratio_are_those_asked_for(settings: dict[str, Any]) -> None:
    net = net_of("alpha")
    pipe, model = pipe_of("alpha", net), fed(net)
    ILFTransformer.install(pipe, model, feedback="all", **settings)
    plan = plan_of(
        model, feedback="all", rule=Rule(settings["rule"]), ratio=Ratio(settings.get("ratio", Ratio.LOOP_TO_MODEL))
    )
    assert relative(run(pipe), reference("alpha", model, plan)) < TRAJECTORY_ROUNDING


@pytest.mark.parametrize("kind", ["alpha", "sigma"])
def test_of_steps_at_one_time_each_gets_its_own_feedback(kind: str) -> None:
    net = net_of(kind)
    pipe, model = pipe_of(kind, net, REPEATED), fed(net)
    plan = plan_of(model, 8, REPEATED, feedback="0,5")
    assert [step.t for step in plan.steps[-4:]] == [0] * 4
    transformer = ILFTransformer.install(pipe, model, feedback="0,5")
    calls: list[tuple[float, float, bool]] = []
    transformer.model.register_forward_pre_hook(
        lambda _, __, given: calls.append((given["timestep"][0].item(), given["t_post"].item(), given["feedback"])),
        with_kwargs=True,
    )
    got = run(pipe, 8)
    assert calls == [(step.t, pytest.approx(step.t_post), step.feedback) for step in plan.steps]
    assert relative(got, reference(kind, model, plan, REPEATED)) < TRAJECTORY_ROUNDING


@pytest.mark.parametrize("kind", ["dit", "alpha"])
def test_every_call_follows_a_plan_of_its_own_steps(kind: str) -> None:
    net = net_of(kind)
    pipe, model = pipe_of(kind, net), fed(net)
    ILFTransformer.install(pipe, model, feedback="outer:1")
    for steps in (STEPS, 4, STEPS, STEPS):
        wanted = reference(kind, model, plan_of(model, steps, feedback="outer:1"))
        assert relative(run(pipe, steps), wanted) < TRAJECTORY_ROUNDING


def test_a_call_that_was_broken_off_leaves_nothing_to_the_next() -> None:
    def stop(step: int, *_: Any) -> None:
        if step == 1:
            raise KeyboardInterrupt

    net = net_of("alpha")
    pipe, model = pipe_of("alpha", net), fed(net)
    ILFTransformer.install(pipe, model, feedback="first:2")
    with pytest.raises(KeyboardInterrupt):
        run(pipe, callback=stop)
    wanted = reference("alpha", model, plan_of(model, feedback="first:2"))
    assert relative(run(pipe), wanted) < TRAJECTORY_ROUNDING


def test_a_scheduler_put_in_later_is_followed() -> None:
    net = net_of("alpha")
    pipe, model = pipe_of("alpha", net), fed(net)
    ILFTransformer.install(pipe, model, feedback="last:2")
    run(pipe)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    config = {**CONFIG, **SCHEDULERS["euler"]}
    wanted = reference("alpha", model, plan_of(model, config=config, feedback="last:2"), config)
    assert relative(run(pipe), wanted) < TRAJECTORY_ROUNDING


# --- what a pipeline sees


@pytest.mark.parametrize("kind", KINDS)
def test_it_has_the_configuration_and_all_channels_of_the_backbone(kind: str) -> None:
    net = net_of(kind)
    pipe, model = pipe_of(kind, net), fed(net)
    transformer = ILFTransformer.install(pipe, model, feedback="all")
    assert transformer.config is net.config
    assert (transformer.dtype, transformer.device) == (net.dtype, net.device)
    seen: list[Tensor] = []
    transformer.register_forward_hook(lambda _, __, output: seen.append(output[0]))
    run(pipe, 2)
    assert {output.shape[1] for output in seen} == {net.config.out_channels} == {2 * net.config.in_channels}


def test_the_model_goes_where_the_replaced_transformer_was() -> None:
    pipe = pipe_of("alpha", net_of("alpha").to(torch.bfloat16))
    transformer = ILFTransformer.install(pipe, fed(net_of("alpha")))
    assert {parameter.dtype for parameter in transformer.parameters()} == {torch.bfloat16}
    assert run(pipe, 2).dtype == torch.bfloat16
    assert pipe.to("cpu", torch.float32).dtype == torch.float32
    assert run(pipe, 2).dtype == torch.float32


def test_a_pipeline_may_be_loaded_without_a_transformer() -> None:
    pipe, model = pipe_of("alpha", None), fed(net_of("alpha"))
    ILFTransformer.install(pipe, model, feedback="all")
    assert relative(run(pipe), reference("alpha", model, plan_of(model, feedback="all"))) < TRAJECTORY_ROUNDING


def test_the_transformer_does_not_keep_its_pipeline_alive() -> None:
    pipe = pipe_of("dit", net_of("dit"))
    transformer = ILFTransformer.install(pipe, fed(pipe.transformer))
    run(pipe, 2)
    del pipe
    with pytest.raises(InvalidRequest, match="the pipeline of this transformer is gone"):
        transformer(torch.zeros(1, 1, 8, 8), timestep=torch.tensor([999]), class_labels=torch.tensor([1]))


# --- whose base it is


def tune(net: Any) -> Any:
    """Other weights, as after a fine-tune."""
    with torch.no_grad():
        for block in net.transformer_blocks:
            block.attn1.to_v.weight.mul_(1.5)
    return net


def inject(net: Any) -> None:
    """An adapter as PEFT injects it."""
    layer = net.transformer_blocks[0].attn1.to_q
    layer.lora_A = nn.ModuleDict({"default": nn.Linear(layer.in_features, 2)})


@pytest.mark.parametrize("kind", ["dit", "alpha"])
def test_a_fine_tuned_pipeline_is_refused_and_stays_as_it_is(kind: str) -> None:
    tuned = tune(net_of(kind))
    pipe = pipe_of(kind, tuned)
    with pytest.raises(InvalidRequest, match=r"is not the model's base: its .* has other values; .* base_differs=True"):
        ILFTransformer.install(pipe, fed(net_of(kind)))
    assert pipe.transformer is tuned


@pytest.mark.parametrize("kind", ["dit", "alpha"])
def test_a_fine_tuned_pipeline_keeps_its_weights_if_the_base_may_differ(kind: str) -> None:
    pipe, model = pipe_of(kind, tune(net_of(kind))), fed(net_of(kind))
    before = run(pipe)
    transformer = ILFTransformer.install(pipe, model, feedback="none", base_differs=True)
    assert relative(run(pipe), before) < TRAJECTORY_ROUNDING
    assert transformer.model.trained_on == fingerprint(model.backbone)
    ILFTransformer.install(pipe, transformer.model, feedback="outer:2")
    tuned = fed(tune(net_of(kind)))
    tuned.feedback.load_state_dict(model.feedback.state_dict())
    wanted = reference(kind, tuned, plan_of(model, feedback="outer:2"))
    assert relative(run(pipe), wanted) < TRAJECTORY_ROUNDING


def test_another_architecture_is_refused_even_if_the_base_may_differ() -> None:
    pipe = pipe_of("alpha", net_of("alpha"))
    with pytest.raises(InvalidRequest, match="its num_layers is 4, the model's 3"):
        ILFTransformer.install(pipe, fed(net_of("alpha", blocks=3)), base_differs=True)


def test_a_pipeline_of_another_kind_is_refused_even_without_a_transformer() -> None:
    with pytest.raises(InvalidRequest, match="DiTPipeline is no pipeline of a pixart; give PixArtAlphaPipeline or Pix"):
        ILFTransformer.install(pipe_of("dit", None), fed(net_of("alpha")))


@pytest.mark.parametrize("base_differs", [False, True])
def test_a_pipeline_with_a_lora_is_refused(base_differs: bool) -> None:
    net = net_of("alpha")
    inject(net)
    with pytest.raises(InvalidRequest, match="the pipeline's transformer has an adapter"):
        ILFTransformer.install(pipe_of("alpha", net), fed(net_of("alpha")), base_differs=base_differs)


def test_a_lora_that_came_after_attach_is_refused() -> None:
    net = net_of("alpha")
    model = fed(net)
    inject(net)
    with pytest.raises(InvalidRequest, match="the model's backbone has an adapter"):
        ILFTransformer.install(pipe_of("alpha", net), model)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_saved_pipeline_has_the_plain_base_and_the_checkpoint(compiled: bool, tmp_path: Path) -> None:
    pipe, model = pipe_of("alpha", net_of("alpha")), fed(net_of("alpha"))
    before = run(pipe)
    ILFTransformer.install(pipe, model, feedback="outer:2")
    if compiled:
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")  # a wrapper; nothing runs
    pipe.save_pretrained(tmp_path)
    parts: Any = {"tokenizer": None, "text_encoder": None, "vae": None}
    loaded = PixArtAlphaPipeline.from_pretrained(tmp_path, **parts)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.transformer) is type(model.backbone)
    assert relative(run(loaded), before) < TRAJECTORY_ROUNDING
    ILFTransformer.install(loaded, load_ilf(tmp_path / "transformer"), feedback="outer:2")
    wanted = reference("alpha", model, plan_of(model, feedback="outer:2"))
    assert relative(run(loaded), wanted) < TRAJECTORY_ROUNDING


@pytest.mark.parametrize("options", [{"safe_serialization": False}, {"variant": "fp16"}], ids=str)
def test_a_pipeline_is_not_saved_as_load_ilf_does_not_read_it(options: dict[str, Any], tmp_path: Path) -> None:
    pipe = pipe_of("alpha", net_of("alpha"))
    ILFTransformer.install(pipe, fed(pipe.transformer))
    with pytest.raises(InvalidRequest, match="reads its base from safetensors without a variant"):
        pipe.save_pretrained(tmp_path, **options)


# --- torch.compile


class Compiler:
    """A backend that runs the graph as it was traced, and counts."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1
        return cast(Callable[..., Any], graph.forward)


@pytest.fixture
def compiler() -> Iterator[Compiler]:
    torch.compiler.reset()
    yield Compiler()
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("kind", "whole"), [("dit", False), ("alpha", False), ("sized alpha", False), ("sized alpha", True)]
)
def test_it_compiles_to_one_graph_for_each_kind_of_step(kind: str, whole: bool, compiler: Compiler) -> None:
    net = net_of(kind, blocks=3)
    pipe = pipe_of(kind, net)
    transformer = ILFTransformer.install(pipe, fed(net), feedback="outer:1")
    wanted, other = run(pipe, 3), run(pipe, 4)
    if whole:
        pipe.transformer = torch.compile(transformer, backend=compiler, fullgraph=True)
    else:
        transformer.compile(backend=compiler, fullgraph=True)
    assert relative(run(pipe, 3), wanted) < TRAJECTORY_ROUNDING
    assert compiler.graphs == 2
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert relative(run(pipe, 4), other) < TRAJECTORY_ROUNDING
        assert relative(run(pipe, 3), wanted) < TRAJECTORY_ROUNDING
    assert compiler.graphs == 2


def test_it_compiles_through_aot_without_a_break(compiler: Compiler) -> None:
    net = net_of("alpha", blocks=3)
    pipe = pipe_of("alpha", net)
    transformer = ILFTransformer.install(pipe, fed(net), feedback="outer:1")
    wanted = run(pipe, 3)
    transformer.compile(backend="aot_eager", fullgraph=True)
    counters = torch._dynamo.utils.counters
    counters.clear()
    assert relative(run(pipe, 3), wanted) < TRAJECTORY_ROUNDING
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


# --- which step it is


class Pipe:
    """As much of a pipeline as a follower asks for."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.scheduler = scheduler_of(config)


def follower_of(pipe: Pipe, feedback: str = "all") -> Follower:
    return Follower(pipe, plan_maker(BLOCKS, Loop(*LOOP), feedback, Rule.ANNEAL, Ratio.LOOP_TO_MODEL))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_run_that_begins_in_the_middle_is_followed_from_there(name: str) -> None:
    pipe = Pipe(SCHEDULERS[name])
    follower, scheduler = follower_of(pipe), pipe.scheduler
    scheduler.set_timesteps(STEPS)
    sample = torch.ones(1, 1, 2, 2)
    for index, t in enumerate(scheduler.timesteps[2:], start=2):
        seen = scheduler.scale_model_input(sample, t)
        assert follower.at(t.expand(3))[1] == index
        assert follower.at(t)[1] == index  # a second call of the same step, as for guidance in two halves
        sample = scheduler.step(seen, t, sample).prev_sample


def test_a_counted_step_does_not_read_the_timestep() -> None:
    """On torch's meta device, which has nothing to read, as reading a GPU would wait for it."""
    pipe = Pipe(CONFIG)
    follower, scheduler = follower_of(pipe), pipe.scheduler
    scheduler.set_timesteps(3)
    scheduler.set_begin_index(0)
    sample = torch.ones(1, 1, 2, 2)
    for index, t in enumerate(scheduler.timesteps):
        assert follower.at(torch.empty(2, device="meta"))[1] == index
        sample = scheduler.step(sample, t, sample).prev_sample


def test_a_run_that_begins_at_a_repeated_time_begins_where_diffusers_does() -> None:
    pipe = Pipe(REPEATED)
    follower, scheduler = follower_of(pipe), pipe.scheduler
    scheduler.set_timesteps(8)
    times = scheduler.timesteps.tolist()
    t = next(t for t, following in pairwise(times) if t == following)
    assert follower.at(t)[1] == scheduler.index_for_timestep(t)


def test_a_plan_is_made_once_a_run() -> None:
    pipe = Pipe(CONFIG)
    follower = follower_of(pipe)
    pipe.scheduler.set_timesteps(3)
    plan = follower.at(999)[0]
    assert follower.at(999)[0] is plan
    pipe.scheduler.set_timesteps(3)
    assert follower.at(999)[0] is not plan


# --- refusals


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "DDIMScheduler"}, "DDIMScheduler: clip_sample is True; supported: False"),
        ({"_class_name": "DDPMScheduler"}, "_class_name is 'DDPMScheduler'; supported: DPMSolverMultistepScheduler or"),
        ({**CONFIG, "algorithm_type": "sde-dpmsolver++"}, "algorithm_type is 'sde-dpmsolver"),
        (
            {**CONFIG, "timestep_spacing": "trailing", "lambda_min_clipped": -3.0},
            "its 5 timesteps 768, 601, 435, …, 101 are not the 4 that its config gives, 768, 568, 368, 168; leave",
        ),
    ],
    ids=["default ddim", "ddpm", "sde", "lambda_min_clipped"],
)
def test_a_scheduler_without_a_plan_is_refused_by_name(config: dict[str, Any], message: str) -> None:
    net = net_of("alpha")
    pipe = pipe_of("alpha", net, config)
    ILFTransformer.install(pipe, fed(net))
    with pytest.raises(UnsupportedScheduler) as caught:
        run(pipe)
    assert message in str(caught.value)


def test_custom_timesteps_are_refused() -> None:
    net = net_of("alpha")
    pipe = pipe_of("alpha", net)
    ILFTransformer.install(pipe, fed(net))
    with pytest.raises(UnsupportedScheduler, match=r"its 3 timesteps 900, 500, 100 are not the 3 .*leave timesteps=…"):
        run(pipe, timesteps=[900, 500, 100])


def test_a_call_outside_of_a_run_is_refused() -> None:
    pipe = Pipe(CONFIG)
    follower = follower_of(pipe)
    with pytest.raises(InvalidRequest, match="DPMSolverMultistepScheduler has no timesteps yet; call"):
        follower.at(999)
    pipe.scheduler.set_timesteps(1)
    with pytest.raises(InvalidRequest, match=r"no step is at time 998; the plan's are 999$"):
        follower.at(torch.tensor([998]))
    pipe.scheduler.step(torch.ones(1), torch.tensor(999), torch.ones(1))
    with pytest.raises(InvalidRequest, match="the scheduler has taken all its 1 steps"):
        follower.at(999)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"feedback": "some"}, "feedback pattern 'some' is unknown"),
        ({"rule": "half"}, "'half' is not a valid Rule; rules are none, uniform"),
        ({"ratio": "m"}, "'m' is not a valid Ratio; rules are"),
    ],
)
def test_unknown_settings_are_refused_at_once_and_change_nothing(settings: dict[str, Any], message: str) -> None:
    net = net_of("dit")
    pipe = pipe_of("dit", net)
    with pytest.raises(InvalidRequest) as caught:
        ILFTransformer.install(pipe, fed(net), **settings)
    assert message in str(caught.value)
    assert pipe.transformer is net


def test_a_model_of_another_base_is_refused() -> None:
    pipe = pipe_of("dit", net_of("dit"))
    with pytest.raises(InvalidRequest, match="DiTPipeline has another transformer than the model's: its num_embeds"):
        ILFTransformer.install(pipe, fed(small_dit()))


def test_a_pipeline_of_another_kind_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="Pipe has no transformer; give a diffusers pipeline such as DiTPipeline"):
        ILFTransformer.install(Pipe(CONFIG), fed(net_of("dit")))
