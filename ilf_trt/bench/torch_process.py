"""The process that measures eager PyTorch and the other rivals of a bundle.

python -m ilf_trt.bench.torch_process
"""

import gc
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ilf_trt import leaves
from ilf_trt.contract.bundle import Bundle
from ilf_trt.contract.plan import StepPlan, cached_block_forwards
from ilf_trt.errors import InvalidRequest, MissingDependency, NonFinite
from ilf_trt.model.checkpoint import fingerprint, read_checkpoint
from ilf_trt.model.sampling import CompileMode, CompileOptions
from ilf_trt.process_memory import peak_mib, reset_peak

from .answering import serve
from .diffusers_graph import DiffusersGraph
from .inputs import read_inputs, write_latents
from .rivals import CACHED_EVERY, Eager, Run, cached_blocks
from .row import Rival

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ON_ONNX_RUNTIME = (Rival.ONNX, Rival.ONE_GRAPH)
MIB = 1 << 20
SHORT = 12


class TorchProcess:
    """One checkpoint, loaded once; its rows are copies of the model that stay ready."""

    def __init__(self) -> None:
        self._eager: Any = None
        self._model: Any = None
        self._bundle: Any = None
        self._device = "cpu"
        self._rows: dict[str, Run] = {}
        self._plans: dict[str, StepPlan] = {}
        self._closing = ExitStack()
        self._noise = torch.zeros(0)
        self._conditions: dict[str, Tensor] = {}

    def facts(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return {"torch": torch.__version__}

    def load(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Load the checkpoint, and check that the bundle was built from it."""
        begin_s = perf_counter()
        self._device = request["device"]
        if self._device != "cpu" and not torch.cuda.is_available():
            raise InvalidRequest(f"torch sees no GPU for --device {self._device}; install torch with CUDA")
        if self._device != "cpu":
            self._device = "cuda:0" if self._device == "cuda" else self._device
            torch.cuda.set_device(self._device)  # whose events and memory are counted
        checkpoint = read_checkpoint(request["checkpoint"])
        self._model = checkpoint.load().float()
        self._check(request)
        if request["threads"]:
            torch.set_num_threads(request["threads"])
        self._eager = Eager(
            self._model,
            request["scheduler"],
            request["guidance_scale"],
            self._device,
            DTYPES[request["precision"]],
            guidance=request["guidance"],
        )
        self._bundle = Bundle.open(request["bundle"], check_hashes=False)
        self._scale, self._guidance = request["guidance_scale"], request["guidance"]
        self._threads = request["threads"]
        return {"load_s": perf_counter() - begin_s, "library": f"torch {torch.__version__}"}

    def inputs(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Read the noise and the conditions of a batch; the rows of an earlier one go, but with `keep`."""
        if not request["keep"]:
            self._closing.close()
            self._rows.clear()
            gc.collect()
            reset_peak()
            if self._device != "cpu":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
        noise, conditions = read_inputs(Path(request["path"]))
        self._noise = torch.from_numpy(noise)
        self._conditions = {name: torch.from_numpy(value) for name, value in conditions.items()}
        return {}

    def open(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Get a row ready; gives the seconds that its copy and its first run took."""
        begin_s = perf_counter()
        slug, plan, rival = request["slug"], StepPlan.from_json(request["plan"]), Rival(request["rival"])
        counted: Callable[[], int] | None = None
        compiled = CompileOptions(CompileMode.REDUCE_OVERHEAD) if rival is Rival.COMPILE else None
        if rival is Rival.ONNX:
            self._rows[slug] = self._closing.enter_context(self._diffusers_graph(plan))
        elif rival is Rival.ONE_GRAPH:
            self._rows[slug] = self._closing.enter_context(self._one_graph(plan))
        elif rival is Rival.CACHE:
            self._rows[slug] = self._closing.enter_context(self._eager.cached(plan))
        elif rival is Rival.CACHE_DIT:
            self._rows[slug], counted = self._closing.enter_context(self._eager.cache_dit(plan))
        elif request["ilf"]:
            self._rows[slug] = self._closing.enter_context(self._eager.ilf(plan, compiled=compiled))
        else:
            self._rows[slug] = self._closing.enter_context(self._eager.plain(plan, compiled=compiled))
        self._plans[slug] = plan
        load_s = perf_counter() - begin_s
        begin_s = perf_counter()
        self._run(slug)
        facts: dict[str, Any] = {"library": _onnxruntime()} if rival in ON_ONNX_RUNTIME else {}
        first_s = perf_counter() - begin_s
        if rival is Rival.CACHE:
            costs = cached_block_forwards(
                plan.blocks, len(plan.steps), cached=cached_blocks(plan.blocks), every=CACHED_EVERY
            )
            facts["block_forwards"] = sum(costs)
        if counted is not None:
            facts["block_forwards"] = counted()
        return {"load_s": load_s, "first_s": first_s, **facts}

    def _diffusers_graph(self, plan: StepPlan) -> AbstractContextManager[Run]:
        options = {"guidance": self._guidance, "threads": self._threads, "device": self._device}
        return DiffusersGraph.opened(self._model, plan, self._scale, **options)

    def shoot(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """One run of a row, from arrays of the host to arrays of the host: the host's ms, and the GPU's."""
        _, host_ms, device_ms = self._run(request["slug"])
        return {"host_ms": host_ms, "device_ms": device_ms}

    def latents(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Write the latents of a row."""
        latents, *_ = self._run(request["slug"])
        write_latents(Path(request["path"]), latents.numpy())
        return {}

    def reference(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Write the latents of a plan in whole float32: what every row is compared with."""
        plan = StepPlan.from_json(request["plan"])
        latents = self._eager.reference(plan, self._conditions, self._noise)
        write_latents(Path(request["path"]), latents.numpy())
        return {}

    def memory(self, _: Mapping[str, Any]) -> dict[str, Any]:
        """Peak memory in MiB: of this process, or what torch took of the GPU."""
        if self._device == "cpu":
            return {"peak_mib": peak_mib()}
        return {"peak_mib": torch.cuda.max_memory_reserved() / MIB}

    def _run(self, slug: str) -> tuple[Tensor, float, float | None]:
        on_gpu = self._device != "cpu"
        if on_gpu:
            torch.cuda.synchronize()
        begin_s = perf_counter()
        conditions = {name: value.to(self._device) for name, value in self._conditions.items()}
        noise = self._noise.to(self._device)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2)) if on_gpu else (None, None)
        if first is not None:
            first.record()
        try:
            latents = self._rows[slug](conditions, noise)
        except NonFinite as error:
            raise NonFinite(f"row {slug}: {error}") from error
        if last is not None:
            last.record()
        latents = latents.cpu()
        host_ms = (perf_counter() - begin_s) * 1000
        return latents, host_ms, None if first is None or last is None else float(first.elapsed_time(last))

    def _check(self, request: Mapping[str, Any]) -> None:
        got, wanted = fingerprint(self._model.backbone), request["base_sha256"]
        if got != wanted:
            raise InvalidRequest(
                f"--checkpoint {request['checkpoint']} has base {got[:SHORT]}, the bundle was built from "
                f"{wanted[:SHORT]}; pass the checkpoint that the bundle was built from"
            )
        scales = self._model.feedback.scales.tolist()
        if len(scales) != len(request["scales"]) or not np.allclose(scales, request["scales"], rtol=1e-5, atol=0):
            raise InvalidRequest(
                f"--checkpoint {request['checkpoint']} has another feedback block than the bundle; pass the checkpoint "
                "that the bundle was built from"
            )

    def _one_graph(self, plan: StepPlan) -> AbstractContextManager[Run]:
        """Loads the exporter, which no other row needs."""
        if self._device != "cpu":
            raise InvalidRequest(f"{Rival.ONE_GRAPH} is measured on a CPU only; leave it out of --against")
        try:
            from .one_graph import one_graph
        except ImportError as error:
            raise MissingDependency(f"this row needs {error.name}; pip install 'ilf-trt[build]'") from error
        return one_graph(self._model, self._bundle, plan, self._noise, self._scale, threads=self._threads)


def _onnxruntime() -> str:
    return f"onnxruntime {leaves.import_onnxruntime().__version__}"


def main() -> int:
    process = TorchProcess()
    names = ("facts", "load", "inputs", "open", "shoot", "latents", "reference", "memory")
    return serve({name: getattr(process, name) for name in names})


if __name__ == "__main__":
    sys.exit(main())
