"""What a request takes by default is what a call of the diffusers pipeline takes."""

import inspect

import diffusers
import pytest

from ilf_trt.assembly.options import BuildOptions
from ilf_trt.errors import InvalidRequest
from ilf_trt.export.pipeline.defaults import RequestDefaults
from ilf_trt.model.backbone import Backbone
from ilf_trt.model.backbones import backbone_of, pipeline_kinds
from tests.conftest import small_dit, small_pixart

NAMED = "any/checkpoint"


@pytest.mark.parametrize("name", pipeline_kinds())
def test_the_facts_of_a_pipeline_class_are_those_of_the_installed_diffusers(name: str) -> None:
    call = inspect.signature(getattr(diffusers, name).__call__).parameters
    kind = pipeline_kinds()[name]
    assert kind.guidance_scale == call["guidance_scale"].default
    assert kind.clean_captions == ("clean_caption" in call and call["clean_caption"].default)
    assert kind.text_tokens == (call["max_sequence_length"].default if "max_sequence_length" in call else None)


def adapter(name: str) -> Backbone:
    if name == "pixart":
        return backbone_of(small_pixart(sized=False, num_layers=1))
    return backbone_of(small_dit(num_layers=1, in_channels={"pixels": 1, "latents": 4}[name]))


@pytest.mark.parametrize(
    ("model", "checkpoint", "options", "wanted"),
    [
        ("pixart", NAMED, {}, (4.5, True)),
        ("latents", NAMED, {}, (4.0, False)),
        ("pixels", NAMED, {}, (1.5, False)),
        ("pixels", "demo", {}, (1.5, False)),
        ("pixart", "demo-emoji", {}, (4.0, False)),
        ("pixart", NAMED, {"guidance_scale": 2.0, "clean_captions": False}, (2.0, False)),
        ("pixart", "demo-emoji", {"guidance_scale": 2.0, "clean_captions": True}, (2.0, True)),
        ("pixart", NAMED, {"guidance_scale": 0.0}, (1.0, True)),
        ("pixart", NAMED, {"guidance": False}, (1.0, True)),
    ],
    ids=str,
)
def test_they_are_the_options_the_packages_or_the_pipelines(
    model: str, checkpoint: str, options: dict[str, float], wanted: tuple[float, bool]
) -> None:
    made = RequestDefaults.of(checkpoint, BuildOptions(**options), None, adapter(model), text=model == "pixart")
    assert (made.guidance_scale, made.clean_captions) == wanted


def test_without_text_there_is_nothing_to_clean() -> None:
    assert not RequestDefaults.of(NAMED, BuildOptions(), None, adapter("pixart"), text=False).clean_captions
    with pytest.raises(InvalidRequest, match="--clean-captions is for a bundle with a text encoder"):
        RequestDefaults.of(NAMED, BuildOptions(clean_captions=True), None, adapter("pixart"), text=False)


def test_guidance_and_no_guidance_contradict_one_another() -> None:
    with pytest.raises(InvalidRequest, match="--guidance-scale 4 and --no-guidance contradict one another"):
        BuildOptions(guidance=False, guidance_scale=4.0).check()
    BuildOptions(guidance=False, guidance_scale=0.0).check()
    with pytest.raises(InvalidRequest, match="it must be finite"):
        BuildOptions(guidance_scale=float("nan")).check()
