"""The eager reference beside loops written by hand over diffusers' own models and schedulers."""

from collections.abc import Callable, Iterator
from typing import Any, cast

import diffusers
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ilf_trt import ILFModel, attach
from ilf_trt.contract.plan import SCHEDULERS, Rule, StepPlan, make_plan
from ilf_trt.contract.spec import Loop
from ilf_trt.errors import InvalidRequest, UnsupportedScheduler
from ilf_trt.model.sampling import CompileMode, CompileOptions, inference_copy, move_to, sample, scheduler_of
from tests.conftest import BLOCKS, CLASSES, LOOP, TEXT_CHANNELS, TEXT_TOKENS, small_dit, small_pixart

PICTURES = 3
STEPS = 5
GUIDANCE = 3.0
# Measured below 6e-7, where two forwards take the place of one of twice the rows.
TRAJECTORY_ROUNDING = 1e-5
# What scales of 0.5 or the rule change is thousands of times larger: measured 0.18 and 0.06.
VISIBLE = 1e-2
# One rounding of every product: measured 2e-3 and 2e-2.
HALF_ROUNDING = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
KINDS = ("dit", "pixart", "unsized pixart")
FEW = LOOP[1] + 1  # blocks, one and the loop's, where Python sees every operation


def plan_of(scheduler: str = "dpmsolver++", *, steps: int = STEPS, blocks: int = BLOCKS, **options: Any) -> StepPlan:
    return make_plan(SCHEDULERS[scheduler], steps, blocks=blocks, loop=Loop(*LOOP), **options)


def relative(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    return float((got - wanted).abs().max() / wanted.abs().max())


def noise_of(backbone: nn.Module) -> Tensor:
    config = cast(Any, backbone.config)
    shape = (PICTURES, config.in_channels, config.sample_size, config.sample_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(9))


def dit_conditions() -> dict[str, Tensor]:
    return {"class_labels": torch.tensor([3, 0, 9], dtype=torch.int32)}


def pixart_conditions(*, sized: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(10)
    conditions = {
        "text": torch.randn(PICTURES, TEXT_TOKENS, TEXT_CHANNELS, generator=generator),
        "text_mask": (torch.arange(TEXT_TOKENS) < torch.tensor([[7], [4], [1]])).float(),
        "negative_text": torch.randn(PICTURES, TEXT_TOKENS, TEXT_CHANNELS, generator=generator),
        "negative_text_mask": (torch.arange(TEXT_TOKENS) < 2).float().repeat(PICTURES, 1),
    }
    sizes = {"resolution": torch.full((PICTURES, 2), 128.0), "aspect_ratio": torch.ones(PICTURES, 1)}
    return conditions | (sizes if sized else {})


def case(kind: str, *, fed: bool, blocks: int = BLOCKS) -> tuple[Any, StepPlan, dict[str, Tensor], Tensor]:
    """A model, a plan of plain steps or of both kinds, conditions and noise; `blocks` of all, the loop's among them."""
    sized = kind == "pixart"
    backbone = small_dit(num_layers=blocks) if kind == "dit" else small_pixart(sized=sized, num_layers=blocks)
    conditions = dit_conditions() if kind == "dit" else pixart_conditions(sized=sized)
    if not fed:
        return backbone, plan_of(blocks=blocks, feedback="none"), conditions, noise_of(backbone)
    model = attach(backbone, LOOP)
    nn.init.constant_(model.feedback.scales, 0.3)
    plan = plan_of(blocks=blocks, feedback="outer:1", rule=Rule.UNIFORM)
    return model, plan, conditions, noise_of(backbone)


def latents_of(model: Any, plan: StepPlan, conditions: dict[str, Tensor], noise: Tensor) -> Tensor:
    return sample(model, plan, SCHEDULERS["dpmsolver++"], conditions, noise, guidance_scale=GUIDANCE)


@torch.no_grad()
def dit_by_hand(backbone: Any, scheduler: Any, labels: Tensor, noise: Tensor, *, guidance: bool) -> Tensor:
    """The loop of diffusers' DiTPipeline."""
    scheduler.set_timesteps(STEPS)
    latents = noise * scheduler.init_noise_sigma
    if guidance:
        labels = torch.cat([labels, torch.full_like(labels, CLASSES)])
    for t in scheduler.timesteps:
        rows = torch.cat([latents, latents]) if guidance else latents
        rows = scheduler.scale_model_input(rows, t)
        output = backbone(rows, timestep=t.expand(len(rows)), class_labels=labels.long()).sample
        epsilon, _ = output.split([1, 1], dim=1)
        if guidance:
            conditional, unconditional = epsilon.chunk(2)
            epsilon = unconditional + GUIDANCE * (conditional - unconditional)
        latents = scheduler.step(epsilon, t, latents).prev_sample
    return latents


@torch.no_grad()
def pixart_by_hand(backbone: Any, scheduler: Any, conditions: dict[str, Tensor], noise: Tensor) -> Tensor:
    """As diffusers' PixArt pipelines, but with one forward for the text and one for the negative text."""
    scheduler.set_timesteps(STEPS)
    latents = noise * scheduler.init_noise_sigma
    sizes = {"resolution": conditions.get("resolution"), "aspect_ratio": conditions.get("aspect_ratio")}
    for t in scheduler.timesteps:
        conditional, unconditional = (
            backbone(
                scheduler.scale_model_input(latents, t),
                encoder_hidden_states=conditions[f"{prefix}text"],
                encoder_attention_mask=conditions[f"{prefix}text_mask"],
                timestep=t.expand(PICTURES),
                added_cond_kwargs=sizes,
            ).sample.chunk(2, dim=1)[0]
            for prefix in ("", "negative_")
        )
        epsilon = unconditional + GUIDANCE * (conditional - unconditional)
        latents = scheduler.step(epsilon, t, latents).prev_sample
    return latents


@pytest.mark.parametrize("guidance", [True, False], ids=["guided", "plain"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_plain_dit_equals_the_loop_of_diffusers(name: str, guidance: bool) -> None:
    backbone, conditions = small_dit(), dit_conditions()
    noise = noise_of(backbone)
    scheduler = getattr(diffusers, SCHEDULERS[name]["_class_name"]).from_config(SCHEDULERS[name])
    got = sample(
        backbone,
        plan_of(name, feedback="none"),
        SCHEDULERS[name],
        conditions,
        noise,
        guidance_scale=GUIDANCE,
        guidance=guidance,
    )
    wanted = dit_by_hand(backbone, scheduler, conditions["class_labels"], noise, guidance=guidance)
    assert relative(got, wanted) < TRAJECTORY_ROUNDING


@pytest.mark.parametrize("scale", [1.0, 0.0, -2.0])
def test_a_scale_of_one_and_less_is_no_guidance(scale: float) -> None:
    model, plan, conditions, noise = case("dit", fed=True)
    config = SCHEDULERS["dpmsolver++"]
    wanted = sample(model, plan, config, conditions, noise, guidance_scale=GUIDANCE, guidance=False)
    assert torch.equal(sample(model, plan, config, conditions, noise, guidance_scale=scale), wanted)


@pytest.mark.parametrize("sized", [True, False], ids=["sized", "unsized"])
def test_a_plain_pixart_equals_the_loop_of_diffusers(sized: bool) -> None:
    backbone, conditions = small_pixart(sized=sized), pixart_conditions(sized=sized)
    noise = noise_of(backbone)
    config = SCHEDULERS["dpmsolver++"]
    got = sample(backbone, plan_of(feedback="none"), config, conditions, noise, guidance_scale=GUIDANCE)
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(config)
    assert relative(got, pixart_by_hand(backbone, scheduler, conditions, noise)) < TRAJECTORY_ROUNDING


@pytest.mark.parametrize("name", SCHEDULERS)
def test_zero_scales_and_rule_none_equal_the_plain_backbone(name: str) -> None:
    backbone, conditions = small_dit(), dit_conditions()
    noise = noise_of(backbone)
    shared: Any = (SCHEDULERS[name], conditions, noise)
    plain = sample(backbone, plan_of(name, feedback="none"), *shared, guidance_scale=GUIDANCE)
    fed = sample(
        attach(backbone, LOOP), plan_of(name, feedback="all", rule=Rule.NONE), *shared, guidance_scale=GUIDANCE
    )
    assert relative(fed, plain) < TRAJECTORY_ROUNDING


@pytest.mark.parametrize("change", ["scales", "rule"])
def test_scales_and_rule_each_change_the_trajectory(change: str) -> None:
    backbone, conditions = small_dit(), dit_conditions()
    noise = noise_of(backbone)
    shared: Any = (SCHEDULERS["dpmsolver++"], conditions, noise)
    model = attach(backbone, LOOP)
    if change == "scales":
        torch.nn.init.constant_(model.feedback.scales, 0.5)
    plan = plan_of(feedback="all", rule=Rule.NONE if change == "scales" else Rule.UNIFORM)
    fed = sample(model, plan, *shared, guidance_scale=GUIDANCE)
    plain = sample(backbone, plan_of(feedback="none"), *shared, guidance_scale=GUIDANCE)
    assert relative(fed, plain) > VISIBLE


def test_without_feedback_the_scales_do_not_matter() -> None:
    backbone, conditions = small_dit(), dit_conditions()
    noise = noise_of(backbone)
    shared: Any = (plan_of(feedback="none"), SCHEDULERS["dpmsolver++"], conditions, noise)
    model = attach(backbone, LOOP)
    torch.nn.init.constant_(model.feedback.scales, 0.5)
    got = sample(model, *shared, guidance_scale=GUIDANCE)
    assert relative(got, sample(backbone, *shared, guidance_scale=GUIDANCE)) < TRAJECTORY_ROUNDING


def test_the_model_is_called_as_the_plan_says() -> None:
    model = attach(small_dit(), LOOP)
    calls: list[tuple[float, float, bool]] = []
    model.register_forward_pre_hook(
        lambda _, __, options: calls.append((options["timestep"][0].item(), options["t_post"], options["feedback"])),
        with_kwargs=True,
    )
    plan = plan_of(feedback="1,3", rule=Rule.UNIFORM)
    noise = noise_of(model.backbone)
    sample(model, plan, SCHEDULERS["dpmsolver++"], dit_conditions(), noise, guidance_scale=GUIDANCE)
    assert calls == [(step.t, step.t_post, step.feedback) for step in plan.steps]


def test_a_guidance_scale_of_one_equals_no_guidance() -> None:
    backbone = small_dit()
    plan = plan_of("ddim", feedback="none")
    shared: Any = (backbone, plan, SCHEDULERS["ddim"], dit_conditions(), noise_of(backbone))
    guided = sample(*shared, guidance_scale=1.0)
    assert relative(guided, sample(*shared, guidance_scale=GUIDANCE, guidance=False)) < TRAJECTORY_ROUNDING


def test_a_picture_does_not_depend_on_its_batch() -> None:
    backbone, conditions = small_dit(), dit_conditions()
    noise = noise_of(backbone)
    shared: Any = (backbone, plan_of(feedback="none"), SCHEDULERS["dpmsolver++"])
    together = sample(*shared, conditions, noise, guidance_scale=GUIDANCE)
    alone = {name: tensor[1:2] for name, tensor in conditions.items()}
    assert relative(sample(*shared, alone, noise[1:2], guidance_scale=GUIDANCE), together[1:2]) < TRAJECTORY_ROUNDING


def test_a_scheduler_that_makes_fewer_steps_than_asked_is_followed() -> None:
    config = {**SCHEDULERS["dpmsolver++"], "timestep_spacing": "trailing", "lambda_min_clipped": -3.0}
    plan = make_plan(config, 10, blocks=BLOCKS, loop=Loop(*LOOP), feedback="none")
    assert len(plan.steps) < 10
    backbone = small_dit()
    latents = sample(backbone, plan, config, dit_conditions(), noise_of(backbone), guidance_scale=GUIDANCE)
    assert latents.isfinite().all()


def test_a_plain_backbone_cannot_take_feedback() -> None:
    backbone = small_dit()
    with pytest.raises(InvalidRequest, match="plain backbone cannot take feedback"):
        sample(
            backbone,
            plan_of(feedback="first:1"),
            SCHEDULERS["ddim"],
            dit_conditions(),
            noise_of(backbone),
            guidance_scale=GUIDANCE,
        )


class Travelling(nn.Linear):
    """Remembers where it was sent."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.places: list[str] = []

    def to(self, *args: Any, **kwargs: Any) -> Any:
        self.places.append(args[0])
        return self


def test_a_model_is_placed_for_a_block_and_comes_back() -> None:
    model = Travelling()
    with move_to(model, "elsewhere"):
        assert model.places == ["elsewhere"]
    assert model.places == ["elsewhere", "cpu"]


def test_a_model_comes_back_from_a_block_that_fails() -> None:
    model = Travelling()
    with pytest.raises(KeyError), move_to(model, "elsewhere"):
        raise KeyError
    assert model.places == ["elsewhere", "cpu"]


def test_a_placed_models_convolutions_are_not_rounded_to_tf32() -> None:
    before = torch.backends.cudnn.allow_tf32
    with move_to(nn.Linear(1, 1), "cpu"):
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == before


@pytest.mark.parametrize(
    "device",
    [
        "nowhere",
        "cpu:x",
        pytest.param("cuda", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="needs no GPU")),
    ],
)
def test_a_device_that_is_not_there_is_refused_in_one_line(device: str) -> None:
    wanted = rf"^device '{device}' cannot be used \(.+\); pass --device cpu$"
    with pytest.raises(InvalidRequest, match=wanted) as caught, move_to(nn.Linear(1, 1), device):
        pytest.fail("the block must not run")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["NoScheduler", "DiTPipeline", "", None], ids=repr)
def test_a_scheduler_that_diffusers_lacks_is_refused(name: str | None) -> None:
    with pytest.raises(UnsupportedScheduler, match=f"has no scheduler '{name or ''}"):
        scheduler_of({"_class_name": name})


@pytest.mark.parametrize("fed", [False, True], ids=["backbone", "ILF"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", HALF_ROUNDING, ids=str)
def test_a_prepared_copy_runs_in_half_precision_and_leaves_the_model_as_it_was(
    dtype: torch.dtype, kind: str, fed: bool
) -> None:
    model, *run = case(kind, fed=fed)
    before = {name: (id(value), value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    copy = inference_copy(model, device="cpu", dtype=dtype)
    assert {value.dtype for value in copy.parameters()} == {dtype}
    assert relative(latents_of(copy, *run), latents_of(model, *run)) < HALF_ROUNDING[dtype]
    for name, value in model.state_dict(keep_vars=True).items():
        was, content = before[name]
        assert id(value) == was
        assert torch.equal(value, content)


def test_a_prepared_ilf_model_is_one_model() -> None:
    model = attach(small_dit(), LOOP)
    copy = inference_copy(model, device="cpu", dtype=torch.bfloat16)
    assert isinstance(copy, ILFModel)
    assert copy.adapter.model is copy.backbone
    assert copy.backbone is not model.backbone


def test_a_prepared_model_of_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"^device 'nowhere' cannot be used"):
        inference_copy(small_dit(), device="nowhere", dtype=torch.float32)


class Compiler:
    """A backend that runs the graph as it was traced, and counts."""

    def __init__(self) -> None:
        self.graphs = 0
        self.modes: set[str] = set()

    def __call__(self, graph: Any, inputs: Any, *, mode: str = "default") -> Callable[..., Any]:
        self.graphs += 1
        self.modes.add(mode)
        return cast(Callable[..., Any], graph.forward)


@pytest.fixture
def compiler() -> Iterator[Compiler]:
    torch.compiler.reset()
    yield Compiler()
    torch.compiler.reset()


@pytest.mark.parametrize("fed", [False, True], ids=["backbone", "ILF"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_compiled_whole_once_for_each_kind_of_step(compiler: Compiler, kind: str, fed: bool) -> None:
    model, *run = case(kind, fed=fed, blocks=FEW)
    compiled = inference_copy(model, device="cpu", dtype=torch.float32, compiled=CompileOptions(backend=compiler))
    first = latents_of(compiled, *run)
    assert compiler.graphs == (2 if fed else 1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        again = latents_of(compiled, *run)
    assert compiler.graphs == (2 if fed else 1)
    assert torch.equal(first, again)
    assert torch.equal(first, latents_of(model, *run))


@pytest.mark.parametrize("mode", CompileMode)
def test_the_compiler_is_told_the_mode(compiler: Compiler, mode: CompileMode) -> None:
    model, *run = case("dit", fed=False, blocks=FEW)
    latents_of(inference_copy(model, device="cpu", dtype=torch.float32, compiled=CompileOptions(mode, compiler)), *run)
    assert compiler.modes == {mode.value}


READS = ("aten::item", "aten::is_nonzero", "aten::_local_scalar_dense")


class Crossings(TorchDispatchMode):
    """Counts tensors that are copied to the device and truths that are read back, which are all true.

    Every other reading raises, as the device holds no values.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies = self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in READS and args[0].is_meta and args[0].dtype is torch.bool:
            self.reads += 1
            return True
        made = func(*args, **(kwargs or {}))
        given = [value for value in args if isinstance(value, Tensor)]
        self.copies += isinstance(made, Tensor) and made.is_meta and bool(given) and not any(v.is_meta for v in given)
        return made


@pytest.mark.parametrize("fed", [False, True], ids=["backbone", "ILF"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_no_step_reads_from_the_device_or_copies_to_it(name: str, kind: str, fed: bool) -> None:
    """On torch's meta device, which like a GPU is another than the host's, and which has nothing to read."""
    model, _, conditions, noise = case(kind, fed=fed, blocks=FEW)
    model = model.to("meta")
    copies = []
    for steps in (2, 4):
        plan = plan_of(name, steps=steps, blocks=FEW, feedback="all" if fed else "none")
        with Crossings() as crossings:
            latents = sample(model, plan, SCHEDULERS[name], conditions, noise, guidance_scale=GUIDANCE)
        assert latents.is_meta
        assert crossings.reads == 1  # at the end, whether the latents are finite
        copies.append(crossings.copies)
    assert copies[0] == copies[1] == len(conditions) + 3  # noise, times, times after feedback


class Attentions(TorchFunctionMode):
    """Counts torch's fused attentions."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.nn.functional.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_every_attention_of_the_plain_backbone_is_torchs_fused_one(kind: str) -> None:
    model, *run = case(kind, fed=False)
    with Attentions() as attentions:
        latents_of(model, *run)
    assert attentions.count == STEPS * BLOCKS * (1 if kind == "dit" else 2)


def test_no_number_that_changes_from_step_to_step_is_handed_over_as_a_python_number() -> None:
    """It would be compiled in, and in a GPU's model be copied there at every step."""
    model, *run = case("pixart", fed=True)
    seen: set[tuple[str, type]] = set()
    model.register_forward_pre_hook(
        lambda _, __, given: seen.update((k, type(v)) for k, v in given.items()), with_kwargs=True
    )
    latents_of(model, *run)
    assert {name for name, kind in seen if kind is not Tensor} == {"feedback", "added_cond_kwargs"}
