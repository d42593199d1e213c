"""The graphs of a bundle inside a pipeline of diffusers: every step runs in ONNX Runtime or TensorRT."""

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from ilf_trt.backbones import adapter_of_kind
from ilf_trt.errors import InvalidRequest
from ilf_trt.schedule import StepPlan, make_plan
from ilf_trt.transformer import StepByStep

RAW = (0.0, 1.0, 0.0, 1.0, 0.0, 0.0)
"""A row of the solver that gives the network's output as it is: guidance and solver are the pipeline's own here."""
KEPT_STEPS = 128
NAMES = {
    "encoder_hidden_states": "text",
    "encoder_attention_mask": "text_mask",
    "class_labels": "class_labels",
}


class ServedTransformer(StepByStep):
    """A bundle as a pipeline's transformer; a step is a plan of one step.

    ServedTransformer.install(pipe, "model.ilf", device="cuda:0")
    pipe("a red fox", num_inference_steps=10)
    """

    def __init__(self, served: Any, config: Any, *, device: str = "cpu", feedback: str | None = None) -> None:
        """`served` is a loaded `ilf_trt.runtime.Pipeline`, `config` that of the transformer it stands for.

        `feedback` None takes the bundle's own pattern. Raises InvalidRequest for a bundle that runs twice the rows.
        """
        manifest = served.manifest
        if manifest.spec.guidance and manifest.batch.fixed:
            raise InvalidRequest(
                f"the bundle's batch of {manifest.batch} is fixed and guided, the pipeline guides itself; build it "
                "with --batch MIN:OPT:MAX, or with --no-guidance"
            )
        own = manifest.plan

        def plan_of(config: dict[str, Any], steps: int) -> StepPlan:
            return make_plan(
                config,
                steps,
                blocks=manifest.spec.blocks,
                loop=manifest.spec.loop,
                feedback=own.feedback if feedback is None else feedback,
                rule=own.rule,
                ratio=own.ratio,
            )

        super().__init__(plan_of)
        self.served = served
        self.config = FrozenDict({**config, "out_channels": manifest.spec.latent[0]})
        self.device, self.dtype = torch.device(device), torch.float32
        self._arguments = adapter_of_kind(manifest.spec.kind).arguments

    @classmethod
    def install(
        cls, pipe: Any, bundle: str | Path, *, device: str = "cpu", feedback: str | None = None, **load: Any
    ) -> Self:
        """Put a bundle in the place of `pipe.transformer`; `load` goes to `ilf_trt.runtime.Pipeline.load`.

        Raises what loading raises, UnsupportedScheduler, InvalidRequest.
        """
        runtime = import_module("ilf_trt.runtime")
        served = runtime.Pipeline.load(bundle, device=device, **{"sessions": 1, "kept": KEPT_STEPS, **load})
        try:
            made = cls(served, dict(pipe.transformer.config), device=device, feedback=feedback)
            made.replace_in(pipe)
        except BaseException:
            served.close()
            raise
        return made

    def close(self) -> None:
        """Free the bundle's graphs."""
        self.served.close()

    def forward(self, hidden_states: Tensor, *args: Any, return_dict: bool = True, **given: Any) -> Any:
        """hidden_states (R, C, H, W), the backbone's own arguments -> sample (R, C, H, W), at the plan's next step."""
        call = {**dict(zip(self._arguments, args, strict=False)), **given}
        _, step = self.next_step(call["timestep"])
        plan = replace(
            self.plan,
            initial_scale=1.0,
            requested_steps=1,
            steps=(replace(step, solver=RAW),),  # type: ignore[type-var]
        )
        cell = self.served.manifest.picture.cell
        latents: Any = hidden_states.float().contiguous()
        on_gpu = latents.device.type == "cuda"
        result = self.served.generate(
            latents=latents if on_gpu else latents.numpy(),
            plan=plan,
            guidance_scale=1.0,
            size=tuple(side * cell for side in latents.shape[2:]),
            binning=False,
            decode=False,
            on_device=on_gpu,
            **self._conditions(call),
        )
        made = from_dlpack(result.latents) if on_gpu else torch.from_numpy(result.latents)
        sample = made.to(hidden_states.dtype)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _conditions(self, call: dict[str, Any]) -> dict[str, Any]:
        ports = {port.name: port for port in self.served.manifest.spec.conditions}
        values = {NAMES[name]: value for name, value in call.items() if name in NAMES}
        values |= call.get("added_cond_kwargs") or {}
        return {
            name: value.detach().cpu().float().numpy().astype(np.dtype(ports[name].dtype))
            for name, value in values.items()
            if name in ports and value is not None
        }
