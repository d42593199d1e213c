"""A drop-in for the transformer of a diffusers pipeline that runs a bundle's graphs, in ONNX Runtime or TensorRT."""

from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from ilf_trt.contract.manifest import Manifest
from ilf_trt.contract.plan import Ratio, Rule, StepPlan
from ilf_trt.contract.spec import ModelSpec
from ilf_trt.errors import InvalidRequest
from ilf_trt.leaves import load_pipeline
from ilf_trt.model.backbone import Backbone
from ilf_trt.model.backbones import adapter_of_kind

from .follower import Follower, plan_maker
from .replaced import check_bundle, replaced_transformer

if TYPE_CHECKING:
    from ilf_trt.leaves import Pipeline

KEPT_STEPS = 128  # each step is a plan of its own, bound once
RAW_OUTPUT = (0.0, 1.0, 0.0, 1.0, 0.0, 0.0)  # c_x, c_out, a, b_0 …: the next latent is what the model puts out


class ServedTransformer(ModelMixin):  # type: ignore[misc]
    """Called by a diffusers pipeline as its own transformer, and like `ILFTransformer` with feedback; has no weights.

    The diffusers pipeline guides and solves, so each call is a plan of one step that ends at the model's output. A
    learned variance is not served: `config.out_channels` are the latent's. Closes the bundle's pipeline with itself.
    `base` is None: the graphs hold its weights, known by `base_sha256`.
    """

    base = None
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")

    def __init__(self, served: "Pipeline", follower: Follower, *, device: str) -> None:
        """`served` is the bundle's pipeline on `device`.

        Raises InvalidRequest for a bundle that runs every picture twice, with guidance or without, and
        UnsupportedBackbone for a bundle of a backbone that is not registered.
        """
        super().__init__()
        spec, batch = served.manifest.spec, served.manifest.batch
        if spec.guidance and batch.fixed:
            raise InvalidRequest(
                f"{served.bundle.path} guides a fixed batch of {batch}, the diffusers pipeline guides itself; build it "
                "with --batch MIN:OPT:MAX, or with --no-guidance"
            )
        self._adapter = adapter_of_kind(spec.kind)
        self.config = config_of(served.manifest)
        self.base_sha256 = served.manifest.base_sha256
        self.device = torch.device(device)
        self._served = served
        self._follower = follower
        self._dtypes = {port.name: getattr(torch, port.dtype) for port in spec.conditions}
        self._plan: StepPlan | None = None
        self._arrays: dict[str, tuple[Tensor, Any]] = {}

    @classmethod
    def install(
        cls,
        pipe: Any,
        bundle: str | Path,
        *,
        device: str = "cpu",
        engine: str | None = None,
        threads: int = 0,
        feedback: str | None = None,
        rule: Rule | str | None = None,
        ratio: Ratio | str | None = None,
    ) -> Self:
        """Put a bundle in the place of `pipe.transformer`, which may be None. Close the returned one at the end.

        `device`, `engine` and `threads` are those of `ilf_trt.runtime.Pipeline.load`; `feedback`, `rule` and `ratio`
        are the bundle's own unless given. The plan follows `pipe.scheduler` and the number of steps of each call.
        The transformer that it replaces must have the weights of the bundle's base, or these in the half that the
        pipeline was loaded in: they are hashed once, which takes some seconds for a large model.
        Raises what `Pipeline.load` raises, InvalidRequest for a bundle that guides or does not fit the pipeline, and
        for a transformer that is another than the base or carries an adapter (LoRA), UnsupportedBackbone for a bundle
        whose backbone is not registered. The pipeline's calls raise UnsupportedScheduler for a scheduler without a
        plan.
        """
        served = load_pipeline(bundle, device=device, engine=engine, threads=threads, sessions=1, kept=KEPT_STEPS)
        try:
            adapter = adapter_of_kind(served.manifest.spec.kind)
            replaced = replaced_transformer(pipe, adapter, config_of(served.manifest))
            spec, plan = served.manifest.spec, served.manifest.plan
            plan_of = plan_maker(
                spec.blocks, spec.loop, feedback or plan.feedback, rule or plan.rule, ratio or plan.ratio
            )
            transformer = cls(served, Follower(pipe, plan_of), device=device)
            if replaced is not None:
                check_bundle(replaced, served.manifest)
        except BaseException:
            served.close()
            raise
        pipe.transformer = transformer
        return transformer

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self, hidden_states: Tensor, *, timestep: Tensor | float, return_dict: bool = True, **arguments: Any
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The backbone's own arguments by name, hidden_states (R, C, H, W) -> sample (R, C, H, W) on its device.

        Raises InvalidRequest for what the bundle does not take, and for a timestep that the scheduler is not at;
        otherwise what `Pipeline.generate` raises. On the CPU, more rows than the
        bundle's batch run one batch after another. On a GPU they raise InvalidRequest.
        """
        plan, index = self._follower.at(timestep)
        if plan is not self._plan:
            self._plan, self._arrays = plan, {}
        spec = self._served.manifest.spec
        conditions = {
            name: self._array(name, tensor) for name, tensor in conditions_of(arguments, self._adapter, spec).items()
        }
        on_device = hidden_states.is_cuda and self.device.type == "cuda"
        latents = hidden_states.detach().float().contiguous()
        cell = self._served.manifest.picture.cell
        result = self._served.generate(
            plan=plan_of_step(plan, index),
            latents=latents if on_device else latents.cpu().numpy(),
            on_device=on_device,
            guidance_scale=1.0,
            size=tuple(side * cell for side in latents.shape[2:]),
            binning=False,
            decode=False,
            **conditions,
        ).latents
        sample = (from_dlpack(result) if on_device else torch.from_numpy(result)).to(hidden_states)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Raises InvalidRequest: the graphs are in the bundle, and a pipeline saved without them would not load."""
        raise InvalidRequest(
            "a served transformer has no weights to save; put the pipeline's own transformer back, then save it"
        )

    def close(self) -> None:
        """Free the bundle's graphs; a second call does nothing."""
        self._served.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _array(self, name: str, tensor: Tensor) -> Any:
        """A condition in numpy, fetched once a run: a pipeline passes the same tensors at every step."""
        entry = self._arrays.get(name)
        if entry is None or entry[0] is not tensor:
            dtype = self._dtypes.get(name, tensor.dtype)
            entry = self._arrays[name] = tensor, tensor.detach().to("cpu", dtype).numpy()
        return entry[1]


def config_of(manifest: Manifest) -> FrozenDict:
    """What a diffusers pipeline reads of its transformer's configuration."""
    spec = manifest.spec
    side = spec.positions.base * spec.patch
    return FrozenDict(sample_size=side, in_channels=spec.latent[0], out_channels=spec.latent[0])


def conditions_of(arguments: dict[str, Any], adapter: type[Backbone], spec: ModelSpec) -> dict[str, Tensor]:
    """The backbone's arguments under the names of the bundle's condition ports; raises InvalidRequest.

    As in the backbone, sizes that the model does not take are left out.
    """
    values = {name: value for name, value in arguments.items() if value is not None}
    unsupported = sorted(values.keys() - (set(adapter.arguments) - {"timestep", *adapter.unsupported}))
    if unsupported:
        raise InvalidRequest(f"{unsupported[0]!r} is not supported by a served transformer; leave it out")
    conditions = adapter.conditions_of(values)
    names = {port.name for port in spec.conditions}
    return {name: value for name, value in conditions.items() if name in names}


def plan_of_step(plan: StepPlan, index: int) -> StepPlan:
    """One step of `plan` alone, which ends at the model's output instead of the solver's next latent."""
    step = replace(plan.steps[index], solver=RAW_OUTPUT)
    feedback = "all" if step.feedback else "none"
    return replace(plan, feedback=feedback, initial_scale=1.0, requested_steps=1, steps=(step,))
