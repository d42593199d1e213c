"""The process that measures a bundle's engines; it cannot load torch.

python -m ilf_trt.bench.runtime_process
"""

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import cycle, islice
from pathlib import Path
from time import perf_counter
from typing import Any

from ilf_trt import leaves
from ilf_trt.contract.device import ordinal_of
from ilf_trt.contract.plan import StepPlan
from ilf_trt.errors import InvalidRequest
from ilf_trt.process_memory import peak_mib, reset_peak

from .answering import serve
from .gpu_memory import GpuMemory
from .inputs import Arrays, read_latents, write_inputs, write_latents
from .row import Boundary

FORBIDDEN = ("torch", "diffusers", "transformers")


class NoTorch:
    """An import hook that refuses torch and what needs it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in FORBIDDEN:
            raise ImportError(f"{name} must not be loaded here: this process measures serving without PyTorch")


class RuntimeProcess:
    """One bundle, loaded once; its rows are step plans."""

    def __init__(self) -> None:
        self._pipeline: Any = None
        self._rows: dict[str, StepPlan] = {}
        self._inputs: tuple[Any, Arrays] = (None, {})
        self._request: dict[str, Any] = {}
        self._boundary = Boundary.DENOISE
        self._scale = 1.0
        self._memory: GpuMemory | None = None

    def facts(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return {"torch": any(name in sys.modules for name in FORBIDDEN)}

    def load(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Load the bundle; gives the plans of the three rows, and what is measured."""
        if (ordinal := ordinal_of(request["device"])) is not None:
            self._memory = GpuMemory(leaves.gpu_used_mib(ordinal))
        begin_s = perf_counter()
        with self._watched():
            self._pipeline = leaves.load_pipeline(
                request["bundle"],
                device=request["device"],
                engine=request["engine"],
                threads=request["threads"],
                sessions=1,
                kept=2 * len(request["front"]) + 6,
            )
        load_s = perf_counter() - begin_s
        pipeline = self._pipeline
        ilf = pipeline.plan(request["ilf_steps"], feedback=request["feedback"])
        plans = {"plain": pipeline.plan(request["steps"], feedback="none"), "equal": self._equal(ilf), "ilf": ilf}
        front = []
        for text in request["front"]:
            steps, _, feedback = text.partition(":")
            front.append(pipeline.plan(int(steps), feedback=feedback))
            if any(step.feedback for step in front[-1].steps):
                front.append(self._equal(front[-1]))
        return {
            "plans": {name: plan.as_json() for name, plan in plans.items()},
            "front": [plan.as_json() for plan in front],
            "device": pipeline.device,
            "load_s": load_s,
        }

    def _equal(self, plan: StepPlan) -> StepPlan:
        """The plain plan of the same number of block forwards, to the nearest step."""
        return self._pipeline.plan(plan.equal_steps, feedback="none")

    def inputs(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Draw the noise of a batch and embed its request; both go into a file for the other process."""
        pipeline, count = self._pipeline, request["batch"]
        manifest = pipeline.manifest
        if count > manifest.batch.max:
            raise InvalidRequest(f"--batch is {count}, the bundle takes at most {manifest.batch.max} at once")
        self._boundary = Boundary(request["boundary"])
        self._scale = request["guidance_scale"] if request["guidance_scale"] is not None else manifest.guidance_scale
        self._request = {"seed": request["seed"], "guidance_scale": self._scale, **_repeated(request, count, manifest)}
        if request["size"] is not None:
            self._request["size"] = tuple(request["size"])
        noise, conditions = pipeline.inputs(**self._request)
        write_inputs(Path(request["path"]), noise, conditions)
        self._inputs = (noise, conditions)
        reset_peak()
        return {"shape": list(noise.shape), "guidance_scale": self._scale}

    def open(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Get a row ready; gives the seconds of its first run."""
        self._rows[request["slug"]] = StepPlan.from_json(request["plan"])
        begin_s = perf_counter()
        with self._watched():
            self._generate(request["slug"])
        return {"load_s": 0.0, "first_s": perf_counter() - begin_s}

    def shoot(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """One run of a row: the host's ms, and the GPU's."""
        begin_s = perf_counter()
        result = self._generate(request["slug"])
        host_ms = (perf_counter() - begin_s) * 1000
        self._check_no_torch()
        return {"host_ms": host_ms, "device_ms": result.timings.device_ms}

    def latents(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Write the latents of a row from the noise in the file."""
        write_latents(Path(request["path"]), self._denoise(request["slug"]).latents)
        return {}

    def pixels(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Write the pixels of latents in a file, in its place; says whether there are any."""
        path = Path(request["path"])
        pixels = self._pipeline.decode(read_latents(path), **self._sized())
        if pixels is not None:
            write_latents(path, pixels)
        return {"pixels": pixels is not None}

    def profile(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Where the time of one run went, in ms by graph; `host` is the rest."""
        result = self._generate(request["slug"], profile=True)
        timings = result.timings
        graph_ms = dict(timings.graph_ms)
        return {**graph_ms, "host": max(timings.total_ms - sum(graph_ms.values()), 0.0)}

    def memory(self, _: Mapping[str, Any]) -> dict[str, Any]:
        """Memory in MiB: the peak of this process, on a GPU what it took of the GPU."""
        return {"peak_mib": peak_mib() if self._memory is None else self._memory.taken_mib}

    def _watched(self) -> AbstractContextManager[None]:
        return nullcontext() if self._memory is None else self._memory.watch()

    def _generate(self, slug: str, *, profile: bool = False) -> Any:
        if self._boundary is Boundary.END_TO_END:
            return self._pipeline.generate(plan=self._rows[slug], profile=profile, **self._request)
        return self._denoise(slug, profile=profile)

    def _denoise(self, slug: str, *, profile: bool = False) -> Any:
        """A row from the noise and the conditions in the file, to latents."""
        noise, conditions = self._inputs
        return self._pipeline.generate(
            latents=noise,
            plan=self._rows[slug],
            guidance_scale=self._scale,
            decode=False,
            profile=profile,
            **self._sized(),
            **conditions,
        )

    def _sized(self) -> dict[str, Any]:
        return {"size": self._request["size"]} if "size" in self._request else {}

    def _check_no_torch(self) -> None:
        loaded = [name for name in FORBIDDEN if name in sys.modules]
        if loaded:
            raise InvalidRequest(f"the process that serves has loaded {', '.join(loaded)}; report this to ilf-trt")


def _repeated(request: Mapping[str, Any], count: int, manifest: Any) -> dict[str, Any]:
    """`count` prompts or labels from those of the request; without any, classes spread over all of them."""
    if request["prompts"]:
        return {"prompt": list(islice(cycle(request["prompts"]), count))}
    if request["labels"]:
        return {"class_labels": list(islice(cycle(request["labels"]), count))}
    if manifest.text is not None:
        return {"prompt": ["a photo"] * count}
    classes = manifest.spec.conditioning.classes
    if classes is None:
        raise InvalidRequest("this bundle takes embedded text; bench needs a bundle of classes or with a text encoder")
    return {"class_labels": [round(index * (classes - 1) / max(count, 2)) for index in range(count)]}


def main() -> int:
    sys.meta_path.insert(0, NoTorch())
    process = RuntimeProcess()
    names = ("facts", "load", "inputs", "open", "shoot", "latents", "pixels", "profile", "memory")
    return serve({name: getattr(process, name) for name in names})


if __name__ == "__main__":
    sys.exit(main())
