"""From prompt to picture beside diffusers' own pipelines: the same latents, the same pictures; and what is refused."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ilf_trt import ILFModel, attach, load_ilf, save_ilf
from ilf_trt.assembly.conductor import build, compile_bundle
from ilf_trt.assembly.options import BuildOptions
from ilf_trt.contract.plan import make_plan
from ilf_trt.contract.ports import DECODE, GRAPHS, TEXT
from ilf_trt.contract.spec import BatchRange
from ilf_trt.contract.target import Architecture, EngineOptions, Library
from ilf_trt.drop_in.eager import ILFTransformer
from ilf_trt.drop_in.served import ServedTransformer
from ilf_trt.errors import InvalidRequest, MissingDependency
from ilf_trt.model.sampling import sample
from ilf_trt.runtime import Pipeline
from ilf_trt.runtime.result import Result
from tests import small_pipelines

STEPS = 4
GUIDANCE = 4.5
LATENT_LIMIT = 1e-4  # relative; the graphs make the same products in another order, measured below 1e-6
PIXEL_LIMIT = 2  # of 255
KINDS = ("dit", "alpha", "alpha sized", "sigma")
PIXARTS = KINDS[1:]
DEFAULTS = (
    "dit",
    "alpha binned",
    "sigma",
)  # diffusers bins sizes by default, and has no table for the two other alphas
RANGE, FIXED = BatchRange(1, 4, 16), BatchRange(2, 2, 2)  # a fixed batch is exported in half the time
# Sigma's are pictures of a VAE with four levels, which has the tables of trained sizes; width alone varies of alpha's.
SIZES = {"alpha": ((16, 16), (16, 24)), "sigma": ((256, 256), (208, 304))}
PUNCTUATED = "A <b>red</b> fox -- @home, https://fox.example/1.jpg &quot;1920x1080&quot;"
SIDES = {"alpha": 8, "alpha sized": 128, "sigma": 32}  # of the latent
LONG = "a red fox jumps over the lazy dog " * 40
FOREIGN = "ein grüner Baum – señor, l'été, 狐狸, 🦊"


@dataclass(frozen=True)
class Pair:
    """A pipeline of diffusers', and the bundle that was built of it."""

    theirs: Any
    ours: Pipeline
    model: ILFModel

    def latents(self, prompt: Sequence[str], *, seed: int = 1, scale: float = GUIDANCE, **options: Any) -> Any:
        """What diffusers' pipeline leaves to its decoder."""
        seen: list[torch.Tensor] = []
        decode = self.theirs.vae.decode

        def watch(latents: torch.Tensor, *given: Any, **named: Any) -> Any:
            seen.append(latents * self.theirs.vae.config.scaling_factor)
            return decode(latents, *given, **named)

        self.theirs.vae.decode = watch
        try:
            pictures = self.pictures(prompt, seed=seed, scale=scale, **options)
        finally:
            self.theirs.vae.decode = decode
        return seen[0].numpy(), pictures

    def pictures(self, prompt: Sequence[Any], *, seed: int, scale: float, **options: Any) -> NDArray[np.uint8]:
        call: dict[str, Any] = {
            "num_inference_steps": STEPS,
            "generator": torch.Generator().manual_seed(seed),
            "guidance_scale": scale,
            "output_type": "np",
            **options,
        }
        if not isinstance(self.theirs, diffusers.DiTPipeline):
            call = {"clean_caption": False, "use_resolution_binning": False, **call}
        images = self.theirs(list(prompt), **call).images
        return (np.asarray(images) * 255).round().astype(np.uint8)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    made: dict[str, Pair] = {}
    cache = tmp_path_factory.mktemp("cache")  # alpha's two models have one text encoder

    def get(kind: str) -> Pair:
        if kind not in made:
            made[kind] = _pair(tmp_path_factory.mktemp(kind.replace(" ", "_")), kind, cache)
        return made[kind]

    return get


def _pipeline(folder: Path, kind: str) -> Any:
    if kind == "dit":
        return small_pipelines.dit_pipeline(folder)
    levels = 4 if kind in ("alpha binned", "sigma") else 2
    return small_pipelines.pixart_pipeline(folder, sigma=kind == "sigma", sized=kind == "alpha sized", levels=levels)


def _pair(folder: Path, kind: str, cache: Path) -> Pair:
    theirs = _pipeline(folder / "pipeline", kind)
    theirs.set_progress_bar_config(disable=True)
    model = attach(theirs.transformer, (1, 2))
    with torch.no_grad():
        model.feedback.scales.copy_(torch.tensor([0.3, -0.2]))
    save_ilf(model, folder / "checkpoint", base="../pipeline/transformer")
    made = BuildOptions(
        batch=RANGE if kind == "alpha" else FIXED,
        pipeline=folder / "pipeline",
        sizes=SIZES.get(kind, SIZES["sigma"] if kind == "alpha binned" else ()),
        text_tokens=300 if kind == "alpha binned" else None,  # so all its graphs are Sigma's, out of the cache
        steps=STEPS,
        feedback="outer:1",
        cache=cache,
        verify=False,
    )
    build(str(folder / "checkpoint"), folder / "bundle", made)
    return Pair(theirs, Pipeline.load(folder / "bundle", threads=1), load_ilf(folder / "checkpoint"))


def relative(got: Any, wanted: Any) -> float:
    assert got.shape == wanted.shape
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def apart(got: Any, wanted: Any) -> int:
    assert got.shape == wanted.shape
    return int(np.abs(got.astype(int) - wanted.astype(int)).max())


def same(pair: Pair, prompt: Sequence[str], **options: Any) -> None:
    """Ours and theirs, with the arguments that both have; `theirs` are diffusers' alone, `ours` the bundle's."""
    only_theirs, only_ours = options.pop("theirs", {}), options.pop("ours", {})
    scale = options.pop("scale", GUIDANCE)
    wanted, pictures = pair.latents(prompt, scale=scale, **options, **only_theirs)
    plan = only_ours.pop("plan", None) or pair.ours.plan(STEPS, feedback="none")
    result = pair.ours.generate(list(prompt), seed=1, guidance_scale=scale, plan=plan, **options, **only_ours)
    assert relative(result.latents, wanted) <= LATENT_LIMIT
    assert apart(result.pixels, pictures) <= PIXEL_LIMIT


@pytest.mark.parametrize(("kind", "scale"), [*((kind, GUIDANCE) for kind in PIXARTS), ("alpha", 1.0), ("sigma", 1.0)])
def test_a_prompt_gives_diffusers_latents_and_picture(pair: Callable[[str], Pair], kind: str, scale: float) -> None:
    same(pair(kind), ["a red fox"], scale=scale)


@pytest.mark.parametrize("kind", PIXARTS)
def test_negative_prompts_and_batches(pair: Callable[[str], Pair], kind: str) -> None:
    negative = ["blurry, low quality", ""]
    same(pair(kind), ["a red fox", "an astronaut riding a horse"], negative_prompt=negative)


@pytest.mark.parametrize("prompt", ["", FOREIGN, LONG, "  Fox \n"], ids=["empty", "foreign", "long", "spaces"])
def test_any_text_is_read_as_diffusers_reads_it(pair: Callable[[str], Pair], prompt: str) -> None:
    same(pair("alpha"), [prompt, "a red fox"], negative_prompt=["", prompt])


def test_what_is_cut_off_a_long_prompt_is_said(pair: Callable[[str], Pair], caplog: pytest.LogCaptureFixture) -> None:
    result = pair("alpha").ours.generate([LONG, "a red fox"], seed=1)
    assert result.cut[1] == ""
    assert result.cut[0]
    assert LONG.strip().endswith(result.cut[0])
    assert "longer than the model's 120 tokens" in caplog.text


def test_captions_are_cleaned_as_diffusers_cleans_them(pair: Callable[[str], Pair]) -> None:
    pytest.importorskip("bs4", reason="cleaning needs beautifulsoup4 and ftfy")
    pytest.importorskip("ftfy", reason="cleaning needs beautifulsoup4 and ftfy")
    same(pair("alpha"), [PUNCTUATED], theirs={"clean_caption": True}, ours={"clean_captions": True})


# --- with the defaults of diffusers


def by_default(two: Pair, what: Any, **options: Any) -> tuple[Result, NDArray[np.uint8]]:
    """Ours and theirs of one request, with nothing set but the seed and the steps, and `options` that both have."""
    images = two.theirs(what, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(1), **options).images
    request = {"class_labels": what} if isinstance(two.theirs, diffusers.DiTPipeline) else {"prompt": what}
    plan = two.ours.plan(STEPS, feedback="none")
    return two.ours.generate(seed=1, plan=plan, **request, **options), np.stack([np.asarray(image) for image in images])


@pytest.mark.parametrize("kind", DEFAULTS)
def test_a_request_with_all_defaults_gives_diffusers_picture(pair: Callable[[str], Pair], kind: str) -> None:
    result, pictures = by_default(pair(kind), [2, 3] if kind == "dit" else ["a red fox", PUNCTUATED])
    assert apart(result.pixels, pictures) <= PIXEL_LIMIT


@pytest.mark.parametrize("kind", DEFAULTS)
@pytest.mark.parametrize("scale", [0.0, -1.0, 1.0])
def test_guidance_is_off_where_it_is_off_in_diffusers(pair: Callable[[str], Pair], kind: str, scale: float) -> None:
    asked = [2, 3] if kind == "dit" else ["a red fox", PUNCTUATED]  # the bundles of these kinds have a fixed batch
    result, pictures = by_default(pair(kind), asked, guidance_scale=scale)
    assert apart(result.pixels, pictures) <= PIXEL_LIMIT
    first, second = result.latents
    assert apart(pictures[0], pictures[1]) > PIXEL_LIMIT
    assert relative(first, second) > LATENT_LIMIT


def test_a_prompt_is_cleaned_unless_it_is_asked_for_as_it_is(pair: Callable[[str], Pair]) -> None:
    ours = pair("sigma").ours
    default, clean, raw = (
        ours.generate([PUNCTUATED] * 2, seed=1, clean_captions=c, decode=False).latents for c in (None, True, False)
    )
    np.testing.assert_array_equal(default, clean)
    assert relative(default, raw) > LATENT_LIMIT
    assert ours.manifest.clean_captions


@pytest.mark.parametrize("kind", ["alpha", "sigma"])
def test_another_size_of_the_bundle(pair: Callable[[str], Pair], kind: str) -> None:
    height, width = SIZES[kind][1]
    same(pair(kind), ["a red fox"], theirs={"height": height, "width": width}, ours={"size": (height, width)})


@pytest.mark.parametrize(
    "name",
    [
        "DPMSolverMultistepScheduler order 1",
        "DPMSolverMultistepScheduler order 2",
        "DPMSolverMultistepScheduler order 3",
        "DDIMScheduler",
        "EulerDiscreteScheduler",
    ],
)
def test_every_scheduler_of_the_plan(pair: Callable[[str], Pair], name: str) -> None:
    two = pair("alpha")
    kind, _, order = name.partition(" order ")
    before = two.theirs.scheduler
    changes = {"solver_order": int(order)} if order else {}
    changes |= {"clip_sample": False, "set_alpha_to_one": False} if kind == "DDIMScheduler" else {}
    scheduler = getattr(diffusers, kind)(**changes)
    spec = two.ours.manifest.spec
    config = {**scheduler.config, "_class_name": kind}
    plan = make_plan(config, STEPS, blocks=spec.blocks, loop=spec.loop, feedback="none")
    two.theirs.scheduler = scheduler
    try:
        same(two, ["a red fox"], ours={"plan": plan})
    finally:
        two.theirs.scheduler = before


def test_classes_by_number_and_name_give_diffusers_pictures(pair: Callable[[str], Pair]) -> None:
    two = pair("dit")
    wanted, pictures = two.latents([2, 3])
    for labels in ([2, 3], ["red fox", "teapot"], ["VULPES VULPES", "teapot"]):
        plan = two.ours.plan(STEPS, feedback="none")
        result = two.ours.generate(class_labels=labels, seed=1, guidance_scale=GUIDANCE, plan=plan)
        assert relative(result.latents, wanted) <= LATENT_LIMIT
        assert apart(result.pixels, pictures) <= PIXEL_LIMIT


@pytest.mark.parametrize("kind", PIXARTS)
def test_feedback_gives_the_references_latents(pair: Callable[[str], Pair], kind: str) -> None:
    two = pair(kind)
    prompt, negative = ["a red fox", "lazy dog"], ["blurry", "ugly"]
    length = two.ours.manifest.text.tokens if two.ours.manifest.text else 0
    text, mask, against, against_mask = two.theirs.encode_prompt(
        prompt, negative_prompt=negative, clean_caption=False, max_sequence_length=length
    )
    conditions = {"text": text, "text_mask": mask.float()}
    conditions |= {"negative_text": against, "negative_text_mask": against_mask.float()}
    side = SIDES[kind]
    if kind == "alpha sized":
        conditions["resolution"] = torch.full((2, 2), 2.0 * side)
        conditions["aspect_ratio"] = torch.ones(2, 1)
    noise = torch.randn(2, 4, side, side, generator=torch.Generator().manual_seed(1))
    plan = two.ours.plan(STEPS, feedback="outer:1")
    manifest = two.ours.manifest
    wanted = sample(two.model, plan, manifest.scheduler, conditions, noise, guidance_scale=GUIDANCE)
    result = two.ours.generate(
        prompt, negative_prompt=negative, seed=1, guidance_scale=GUIDANCE, plan=plan, decode=False
    )
    assert relative(result.latents, wanted.numpy()) <= LATENT_LIMIT


def test_a_size_is_brought_to_the_nearest_that_was_trained(pair: Callable[[str], Pair]) -> None:
    asked = (200, 300)
    two = pair("sigma")
    height, width = asked
    pictures = two.pictures(
        ["a red fox"], seed=1, scale=GUIDANCE, height=height, width=width, use_resolution_binning=True
    )
    plan = two.ours.plan(STEPS, feedback="none")
    result = two.ours.generate("a red fox", size=asked, seed=1, guidance_scale=GUIDANCE, plan=plan)
    assert result.latents.shape[2:] == (26, 38)
    assert apart(result.pixels, pictures) <= PIXEL_LIMIT
    with pytest.raises(InvalidRequest, match=r"size 100x400 \(made as 128x512\) is not among .* nearest is 208x304"):
        two.ours.generate("a red fox", size=(100, 400))
    with pytest.raises(InvalidRequest, match="size 200x300 is not among the bundle's 256x256, 208x304; the nearest is"):
        two.ours.generate("a red fox", size=asked, binning=False)


def test_every_graph_of_a_pipeline_becomes_an_engine(pair: Callable[[str], Pair], tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX builds without a GPU")
    engines = EngineOptions(Library.TENSORRT_RTX, (Architecture(8, 9),))
    made = compile_bundle(pair("alpha").ours.bundle.path, tmp_path / "engines.ilf", engines)
    assert [facts.graph for facts in made.bundle.manifest.engines] == [*GRAPHS, TEXT, DECODE]


# --- inside diffusers' own pipelines


@pytest.fixture
def untouched(pair: Callable[[str], Pair], request: pytest.FixtureRequest) -> Iterator[Pair]:
    """A pair whose pipeline gets its transformer and scheduler back."""
    two = pair(request.param)
    before = two.theirs.transformer, two.theirs.scheduler
    yield two
    two.theirs.transformer, two.theirs.scheduler = before


def asked(kind: str) -> tuple[list[Any], dict[str, Any]]:
    """What to ask theirs and ours for."""
    if kind == "DiTPipeline":
        return [2, 3], {"class_labels": [2, 3]}
    return ["a red fox", "lazy dog"], {"prompt": ["a red fox", "lazy dog"]}


@pytest.mark.parametrize(
    ("untouched", "served"), [*((kind, False) for kind in KINDS), ("alpha", True)], indirect=["untouched"]
)
def test_a_pipeline_of_diffusers_samples_with_feedback(untouched: Pair, served: bool) -> None:
    two = untouched
    theirs, ours = asked(type(two.theirs).__name__)
    plain, _ = two.latents(theirs)
    if served:
        made = ServedTransformer.install(two.theirs, two.ours.bundle.path, feedback="outer:1", threads=1)
    else:
        made = ILFTransformer.install(two.theirs, two.model, feedback="outer:1")
    plan = two.ours.plan(STEPS, feedback="outer:1")
    wanted = two.ours.generate(**ours, seed=1, guidance_scale=GUIDANCE, plan=plan).latents
    for _ in range(2):
        got, _ = two.latents(theirs)
        assert relative(got, wanted) <= LATENT_LIMIT
    assert relative(got, plain) > LATENT_LIMIT
    other, _ = two.latents(theirs, num_inference_steps=STEPS + 2)
    assert np.isfinite(other).all()
    if isinstance(made, ServedTransformer):
        made.close()


@pytest.mark.parametrize("untouched", ["alpha", "dit"], indirect=True)
def test_without_feedback_a_pipeline_gives_what_it_gave(untouched: Pair) -> None:
    theirs, _ = asked(type(untouched.theirs).__name__)
    before, pictures = untouched.latents(theirs)
    ILFTransformer.install(untouched.theirs, untouched.model, feedback="none")
    after, same_pictures = untouched.latents(theirs)
    assert relative(after, before) <= LATENT_LIMIT
    assert apart(same_pictures, pictures) <= PIXEL_LIMIT


# --- what the door refuses


def refused(call: Callable[[], Any], match: str) -> None:
    with pytest.raises(InvalidRequest, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


NARROW = np.zeros((1, 120, 31), np.float32)
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"prompt": []}, "prompt is an empty list"),
    ({"prompt": ["fox", 3]}, "prompt is 3, expected a text, or a list of texts"),
    ({"prompt": "fox", "class_labels": [1]}, "prompt and class_labels are both given"),
    ({"negative_prompt": "blurry"}, "negative_prompt is given without a prompt"),
    ({"prompt": ["a", "b", "c"], "negative_prompt": ["x", "y"]}, "2 negative prompts for 3 prompts"),
    ({"prompt": "fox", "text": np.zeros((1, 120, 32), np.float32)}, "prompt and text are both given"),
    ({"text": NARROW, "negative_text": NARROW}, r"text has shape \(1, 120, 31\), expected"),
    ({"prompt": "fox", "latents": np.zeros((1, 4, 8, 9), np.float32)}, r"latents are float32 \(1, 4, 8, 9\), expected"),
    ({"prompt": "fox", "latents": np.full((1, 4, 8, 8), np.nan, np.float32)}, "latents hold NaN"),
    ({"prompt": "fox", "steps": -3}, "-3"),
    ({"prompt": "fox", "steps": 0}, "0"),
    ({"prompt": "fox", "guidance_scale": float("nan")}, "guidance_scale is nan, it must be a finite number"),
    ({"prompt": "fox", "size": (16, 17)}, "size 16x17 is not among the bundle's 16x16, 16x24; the nearest is 16x16"),
    ({"prompt": "fox", "size": 16}, r"size is 16, expected \(height, width\)"),
    ({"prompt": "fox", "size": (0, -16)}, "size is 0, it must be a whole number from 1 to"),
    ({"prompt": "fox", "seed": [1, 2]}, "2 seeds for 1 pictures"),
    ({"prompt": "fox", "on_device": True}, "on_device needs a pipeline on a GPU"),
    ({"class_labels": [1]}, "'class_labels' is not a condition of this bundle; it takes text"),
    ({}, "'negative_text' is missing; this bundle takes text"),
]


@pytest.mark.parametrize(("given", "match"), WRONG, ids=[match[:30] for _, match in WRONG])
def test_a_request_that_cannot_be_served_is_refused(
    pair: Callable[[str], Pair], given: dict[str, Any], match: str
) -> None:
    refused(lambda: pair("alpha").ours.generate(**given), match)


def test_steps_and_plan_together_are_refused(pair: Callable[[str], Pair]) -> None:
    ours = pair("alpha").ours
    refused(lambda: ours.generate("fox", steps=3, plan=ours.plan(3)), "steps and plan are both given")


def test_a_name_that_is_nearly_a_class_is_refused_with_the_class(pair: Callable[[str], Pair]) -> None:
    refused(
        lambda: pair("dit").ours.generate(class_labels=["red fix"]), "'red fix' is no class; did you mean 'red fox'"
    )


def test_a_prompt_for_a_bundle_without_text_encoder_is_refused(pixart_bundle: Path) -> None:
    with Pipeline.load(pixart_bundle, threads=1) as ours:
        refused(lambda: ours.generate("fox"), "this bundle has no text encoder; it takes text, text_mask")
        text = next(port for port in ours.manifest.spec.conditions if port.name == "text")
        given = np.zeros(text.resolve({"B": 1}), np.float32)
        result = ours.generate(text=given, negative_text=given)
        assert result.pixels is None
        refused(lambda: result.images, "these are latents without pictures")


@pytest.mark.parametrize("library", ["tokenizers", "bs4", "ftfy"])
def test_a_missing_library_is_named_when_the_bundle_is_loaded(
    pair: Callable[[str], Pair], library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingDependency, match=r"pip install 'ilf-trt\[text\]'"):
        Pipeline.load(pair("alpha").ours.bundle.path)


def test_low_memory_gives_the_same_pictures(pair: Callable[[str], Pair]) -> None:
    whole = pair("alpha").ours
    with Pipeline.load(whole.bundle.path, threads=1, low_memory=True) as small:
        small.warm_up()
        for prompt in ("a red fox", "lazy dog"):
            one, other = (each.generate(prompt, seed=2) for each in (whole, small))
            np.testing.assert_array_equal(one.latents, other.latents)
            np.testing.assert_array_equal(one.pixels, other.pixels)
