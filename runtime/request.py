"""The request: everything that one generation asks for, checked once against a bundle's manifest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypeVar

from numpy.typing import ArrayLike, NDArray

from ilf_trt.contract.class_names import labels_of
from ilf_trt.contract.guidance import OFF, effective_scale
from ilf_trt.contract.manifest import Manifest
from ilf_trt.contract.plan import LARGEST, Ratio, Rule, StepPlan, make_plan
from ilf_trt.contract.ports import Role
from ilf_trt.contract.solver import MOST_STEPS
from ilf_trt.errors import InvalidRequest, told

from .arguments import flag_of, listed, real_of, rows_of, text_of, whole_of
from .picture.size import PictureSize
from .start_noise import SEEDS, NoiseSource
from .text.prompts import Prompt, Prompts

Kind = TypeVar("Kind", Rule, Ratio)

FINITE = "a finite number in float32"
MOST_SIDE = 1 << 20
MOST_CLASS = (1 << 31) - 1
MOST_PATTERN = 4000  # "0,1,2 … 999" has 3,889 characters


@dataclass(frozen=True, slots=True)
class Request:
    """One generation. Start noise: `latents` (B, C, H, W) of unit variance, or else `seed` and its `noise` source.

    `conditions` are by port, without those that a text encoder makes of the `prompts`. `guidance_scale` is at least 1;
    `guided` requests run every picture twice.
    """

    plan: StepPlan
    size: PictureSize
    guidance_scale: float
    guided: bool
    prompts: Prompts | None
    conditions: Mapping[str, Any]
    seed: int | Sequence[int]
    noise: NoiseSource | str
    latents: Any

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        /,
        prompt: Prompt | None = None,
        *,
        negative_prompt: Prompt | None = None,
        class_labels: Any = None,
        size: Sequence[int] | None = None,
        steps: int | None = None,
        plan: StepPlan | None = None,
        guidance_scale: float | None = None,
        seed: int | Sequence[int] = 0,
        noise: NoiseSource | str = NoiseSource.TORCH,
        latents: ArrayLike | None = None,
        clean_captions: bool | None = None,
        binning: bool = True,
        **conditions: Any,
    ) -> "Request":
        """A request for prompts, for classes (by number or name), or for `conditions` by the bundle's port names.

        | argument | meaning |
        |---|---|
        | `size` | (height, width) in pixels, one that the bundle was built for |
        | `binning` | make the nearest size that the model was trained on, then scale and crop to `size` |
        | `steps`, `plan` | another number of steps, or another plan (see `Pipeline.plan`), than the bundle's |
        | `guidance_scale` | 1 or less, as in diffusers: no guidance, every picture runs once instead of twice |
        | `seed` | one number draws the batch as diffusers does with one generator; a list draws each picture alone |
        | `noise` | `torch` or `numpy`: whose generator the seed is for |
        | `latents` | start noise (B, C, H, W) of unit variance, in numpy or on the GPU by DLPack |
        | `clean_captions` | remove links, tags and the like from the prompts; by default as the bundle says |

        One request is for at most MOST_PICTURES pictures. Raises InvalidRequest for anything that does not fit the
        bundle.
        """
        plan = _plan(manifest, plan, steps)
        scale = _scale(manifest, guidance_scale)
        clean = manifest.clean_captions if clean_captions is None else flag_of("clean_captions", clean_captions)
        _check_names(manifest, conditions)
        values = {name: rows_of(name, value) for name, value in conditions.items()}
        if class_labels is not None:
            if prompt is not None:
                raise InvalidRequest("prompt and class_labels are both given; a model takes one of them")
            label = manifest.spec.conditioning.port(Role.LABEL)
            values["class_labels" if label is None else label.name] = _labels(manifest, class_labels)
        if negative_prompt is not None and prompt is None:
            raise InvalidRequest("negative_prompt is given without a prompt; give both")
        if prompt is not None and manifest.text is None:
            names = ", ".join(port.name for port in manifest.spec.conditions)
            raise InvalidRequest(f"this bundle has no text encoder; it takes {names}, or build it with --pipeline")
        return cls(
            plan=plan,
            size=picture_size(manifest, size, binning=flag_of("binning", binning)),
            guidance_scale=scale,
            guided=manifest.spec.guidance and (scale > OFF or manifest.batch.fixed),
            prompts=None if prompt is None else Prompts.of(prompt, negative_prompt, clean=clean),
            conditions=values,
            seed=seed if isinstance(seed, Integral) or latents is not None else tuple(listed("seed", seed, SEEDS)),
            noise=noise,
            latents=latents,
        )

    def conditions_of(
        self, manifest: Manifest, text: Mapping[str, NDArray[Any]]
    ) -> tuple[dict[str, NDArray[Any]], int]:
        """All conditions, checked, and the number of pictures; `text` is what the text encoder made of the prompts.

        Raises InvalidRequest.
        """
        twice = sorted(self.conditions.keys() & text.keys())
        if twice:
            raise InvalidRequest(f"prompt and {twice[0]} are both given; give one of them")
        conditioning = manifest.spec.conditioning
        values = conditioning.with_size({**self.conditions, **text}, self.size.native)
        if not self.guided:
            unused = {port.name for port in manifest.spec.conditions} - {port.name for port in conditioning.positive}
            values = {name: value for name, value in values.items() if name not in unused}
        return conditioning.validate(values, guidance=self.guided)


def changed_plan(
    manifest: Manifest,
    steps: int | None = None,
    *,
    feedback: str | None = None,
    rule: Rule | str | None = None,
    ratio: Ratio | str | None = None,
) -> StepPlan:
    """The bundle's plan with some of its settings replaced; nothing is rebuilt. Raises InvalidRequest."""
    own, spec = manifest.plan, manifest.spec
    return make_plan(
        manifest.scheduler,
        own.requested_steps if steps is None else whole_of("steps", steps, most=MOST_STEPS),
        blocks=spec.blocks,
        loop=spec.loop,
        feedback=own.feedback if feedback is None else _pattern(feedback),
        rule=own.rule if rule is None else _member("rule", rule, Rule),
        ratio=own.ratio if ratio is None else _member("ratio", ratio, Ratio),
    )


def picture_size(manifest: Manifest, size: Sequence[int] | None, *, binning: bool) -> PictureSize:
    """The sizes for a request; without `size`, the bundle's default. Raises InvalidRequest."""
    if size is None:
        return PictureSize.of(manifest, None, binning=binning)
    expected = "(height, width) in pixels, such as (512, 768)"
    sides = listed("size", size, expected)
    if len(sides) != 2:
        raise InvalidRequest(f"size is {told(sides)}, expected {expected}")
    height, width = (whole_of("size", side, most=MOST_SIDE) for side in sides)
    return PictureSize.of(manifest, (height, width), binning=binning)


def _plan(manifest: Manifest, plan: StepPlan | None, steps: int | None) -> StepPlan:
    if plan is None:
        return manifest.plan if steps is None else changed_plan(manifest, steps)
    if steps is not None:
        raise InvalidRequest("steps and plan are both given; give one of them")
    if not isinstance(plan, StepPlan):
        raise InvalidRequest(f"plan is {told(plan)}, expected a StepPlan; make one with pipeline.plan(…)")
    spec = manifest.spec
    if (plan.blocks, plan.loop) != (spec.blocks, spec.loop):
        raise InvalidRequest(
            f"plan is for {plan.blocks} blocks and loop {plan.loop.begin}:{plan.loop.end}, the bundle has "
            f"{spec.blocks} and {spec.loop.begin}:{spec.loop.end}; make one with pipeline.plan(…)"
        )
    return plan


def _pattern(feedback: Any) -> str:
    text = text_of("feedback", feedback, "all, none, alternate, first:K, last:K, outer:K, inner:K or 0,1,8")
    if len(text) > MOST_PATTERN:
        raise InvalidRequest(f"feedback is a pattern of {len(text)} characters, at most {MOST_PATTERN} are read")
    return text


def _member(name: str, value: Any, kind: type[Kind]) -> Kind:
    known = f"one of {', '.join(kind)}"
    text = text_of(name, value, known)
    try:
        return kind(text)
    except ValueError as error:
        raise InvalidRequest(f"{name} {told(text)} is unknown; it is {known}") from error


def _scale(manifest: Manifest, guidance_scale: float | None) -> float:
    scale = manifest.guidance_scale if guidance_scale is None else real_of("guidance_scale", guidance_scale, FINITE)
    if abs(scale) > LARGEST:
        raise InvalidRequest(f"guidance_scale is {scale:g}, it must be {FINITE}")
    if manifest.spec.guidance:
        return effective_scale(scale)
    if guidance_scale is not None and scale > OFF:
        raise InvalidRequest(
            f"guidance_scale is {scale:g}, this bundle was built with --no-guidance; leave it out, or build it with "
            "guidance"
        )
    return OFF


def _labels(manifest: Manifest, labels: Any) -> NDArray[Any]:
    """A row for each picture: numbers as they are, one label as a list of one, and names by the bundle's own."""
    items = [labels] if isinstance(labels, str | Integral) else labels
    if isinstance(items, Sequence):
        items = listed("class_labels", items, "numbers or names of classes")
        if any(isinstance(item, str) for item in items):
            asked = [item if isinstance(item, str) else _class(item) for item in items]
            items = labels_of(asked, manifest.picture.names, manifest.spec.conditioning.classes)
    return rows_of("class_labels", items)


def _class(item: Any) -> int:
    return whole_of("class_labels", item, least=0, most=MOST_CLASS)


def _check_names(manifest: Manifest, conditions: Mapping[str, Any]) -> None:
    names = [port.name for port in manifest.spec.conditions]
    for name in sorted(conditions.keys() - set(names)):
        raise InvalidRequest(f"{name!r} is not a condition of this bundle; it takes {', '.join(names)}")
