"""The request: everything that one generation asks for, checked once against a bundle's manifest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ilf_trt.contract.class_names import labels_of
from ilf_trt.contract.guidance import OFF, effective_scale
from ilf_trt.contract.manifest import Manifest
from ilf_trt.contract.plan import Ratio, Rule, StepPlan, make_plan
from ilf_trt.contract.ports import Role
from ilf_trt.errors import InvalidRequest

from .picture.size import PictureSize
from .start_noise import NoiseSource
from .text.prompts import Prompt, Prompts


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

        Raises InvalidRequest for anything that does not fit the bundle.
        """
        plan = _plan(manifest, plan, steps)
        scale = _scale(manifest, guidance_scale)
        clean = manifest.clean_captions if clean_captions is None else clean_captions
        values = dict(conditions)
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
            size=PictureSize.of(manifest, size, binning=binning),
            guidance_scale=scale,
            guided=manifest.spec.guidance and (scale > OFF or manifest.batch.fixed),
            prompts=None if prompt is None else Prompts.of(prompt, negative_prompt, clean=clean),
            conditions=values,
            seed=seed,
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
    if steps is not None and (not isinstance(steps, Integral) or isinstance(steps, bool) or steps < 1):
        raise InvalidRequest(f"steps is {steps!r}, it must be a whole number of at least 1")
    try:
        rule = own.rule if rule is None else Rule(rule)
        ratio = own.ratio if ratio is None else Ratio(ratio)
    except ValueError as error:
        raise InvalidRequest(f"{error}; rules are {', '.join(Rule)}, ratios {', '.join(Ratio)}") from error
    return make_plan(
        manifest.scheduler,
        own.requested_steps if steps is None else int(steps),
        blocks=spec.blocks,
        loop=spec.loop,
        feedback=own.feedback if feedback is None else feedback,
        rule=rule,
        ratio=ratio,
    )


def _plan(manifest: Manifest, plan: StepPlan | None, steps: int | None) -> StepPlan:
    if plan is None:
        return manifest.plan if steps is None else changed_plan(manifest, steps)
    if steps is not None:
        raise InvalidRequest("steps and plan are both given; give one of them")
    spec = manifest.spec
    if (plan.blocks, plan.loop) != (spec.blocks, spec.loop):
        raise InvalidRequest(
            f"plan is for {plan.blocks} blocks and loop {plan.loop.begin}:{plan.loop.end}, the bundle has "
            f"{spec.blocks} and {spec.loop.begin}:{spec.loop.end}; make one with pipeline.plan(…)"
        )
    return plan


def _scale(manifest: Manifest, guidance_scale: float | None) -> float:
    scale = manifest.guidance_scale if guidance_scale is None else guidance_scale
    if not isinstance(scale, Real) or not abs(scale) <= float(np.finfo(np.float32).max):
        raise InvalidRequest(f"guidance_scale is {scale}, it must be finite")
    if manifest.spec.guidance:
        return effective_scale(float(scale))
    if guidance_scale is not None and scale > OFF:
        raise InvalidRequest(
            f"guidance_scale is {scale:g}, this bundle was built with --no-guidance; leave it out, or build it with "
            "guidance"
        )
    return OFF


def _labels(manifest: Manifest, labels: Any) -> Any:
    """Numbers as they are, one label as a list of one, and names by the bundle's own."""
    listed = [labels] if isinstance(labels, str | int) else labels
    if isinstance(listed, Sequence) and any(isinstance(label, str) for label in listed):
        return labels_of(listed, manifest.picture.names, manifest.spec.conditioning.classes)
    return listed
