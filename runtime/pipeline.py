"""The public face of the runtime: load a bundle, generate, close."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from queue import LifoQueue
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ilf_trt.bundle import Bundle
from ilf_trt.conditions import as_array, check_conditions
from ilf_trt.contract import Precision
from ilf_trt.errors import InvalidRequest
from ilf_trt.manifest import Manifest
from ilf_trt.schedule import Ratio, Rule, StepPlan, make_plan

from .engine import Engine
from .noise import NoiseSource, noise_per_picture
from .noise import noise as draw_noise
from .onnxruntime_engine import OnnxRuntimeEngine
from .session import Session, Timings

DEFAULT_SESSIONS = 4


@dataclass(frozen=True, slots=True)
class Result:
    """What `generate` gives: latents float32 (B, C, H, W), how long it took, and the plan that it followed."""

    latents: NDArray[np.float32]
    timings: Timings
    plan: StepPlan


class Pipeline:
    """A loaded bundle. Threads may share it: each generation borrows a session, all share the engines."""

    def __init__(self, bundle: Bundle, engines: Mapping[str, Engine], *, sessions: int = DEFAULT_SESSIONS) -> None:
        self.bundle = bundle
        self._engines = engines
        self.constants = bundle.constants()
        self._closed = False
        self._pool: LifoQueue[Session | None] = LifoQueue()
        for _ in range(sessions):
            self._pool.put(None)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str = "cpu",
        threads: int = 0,
        sessions: int = DEFAULT_SESSIONS,
        check_hashes: bool = True,
    ) -> Self:
        """Check a bundle and load its graphs.

        `threads` 0 leaves the number of engine threads to the library (1 is faster for tiny models); at most `sessions`
        generations run at once.
        Raises BundleError, EngineError, PortMismatch, InvalidRequest.
        """
        if device != "cpu":
            raise InvalidRequest(f"device {device!r} is not supported by this version; use device='cpu'")
        if sessions < 1:
            raise InvalidRequest(f"sessions is {sessions}, it must be at least 1")
        bundle = Bundle.open(path, check_hashes=check_hashes)
        if bundle.manifest.precision is Precision.BF16:
            raise InvalidRequest(
                f"{path} is in bf16, which ONNX Runtime does not run on a CPU; build it with --precision fp16"
            )
        engines = {
            graph.name: OnnxRuntimeEngine(graph, bundle.graph_path(graph.name), threads=threads)
            for graph in bundle.manifest.graphs
        }
        return cls(bundle, engines, sessions=sessions)

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    @property
    def engines(self) -> Mapping[str, Engine]:
        """The loaded graphs, for tools that run one alone."""
        return self._engines

    def generate(
        self,
        *,
        seed: int | Sequence[int] = 0,
        latents: ArrayLike | None = None,
        noise: NoiseSource | str = NoiseSource.TORCH,
        guidance_scale: float | None = None,
        plan: StepPlan | None = None,
        **conditions: Any,
    ) -> Result:
        """Latents for the pictures that `conditions` ask for, under the names of the bundle's condition ports.

        Start noise: `seed` draws the whole batch as diffusers does with one generator; a list draws each picture from
        its own; `latents` (B, C, H, W) of unit variance replaces both. `plan` (see `self.plan`) replaces the bundle's.
        Raises InvalidRequest for anything that does not fit, EngineError when an engine fails.
        """
        if self._closed:
            raise InvalidRequest("this pipeline is closed; load the bundle again")
        plan = self.manifest.plan if plan is None else self._checked_plan(plan)
        arrays, pictures = check_conditions(self.manifest.spec.conditions, conditions)
        self.manifest.batch.check(pictures)
        start = self._start(pictures, seed, latents, noise)
        scale = self.manifest.guidance_scale if guidance_scale is None else guidance_scale
        if not isinstance(scale, Real) or not abs(scale) <= float(np.finfo(np.float32).max):
            raise InvalidRequest(f"guidance_scale is {scale}, it must be finite")
        session = self._pool.get()
        try:
            session = session or Session(self._engines, self.manifest, self.constants)
            result, timings = session.trajectory(plan, pictures).run(start, arrays, scale)
        finally:
            self._pool.put(session)
        return Result(result, timings, plan)

    def plan(
        self,
        steps: int | None = None,
        *,
        feedback: str | None = None,
        rule: Rule | str | None = None,
        ratio: Ratio | str | None = None,
    ) -> StepPlan:
        """The bundle's plan with some of its settings replaced; nothing is rebuilt."""
        old, spec = self.manifest.plan, self.manifest.spec
        try:
            rule = old.rule if rule is None else Rule(rule)
            ratio = old.ratio if ratio is None else Ratio(ratio)
        except ValueError as error:
            raise InvalidRequest(f"{error}; rules are {', '.join(Rule)}, ratios {', '.join(Ratio)}") from error
        return make_plan(
            self.manifest.scheduler,
            old.requested_steps if steps is None else steps,
            blocks=spec.blocks,
            loop=spec.loop,
            feedback=old.feedback if feedback is None else feedback,
            rule=rule,
            ratio=ratio,
        )

    def close(self) -> None:
        """Free the engines; generations that still run must have ended."""
        self._closed = True
        for engine in self._engines.values():
            engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _checked_plan(self, plan: StepPlan) -> StepPlan:
        spec = self.manifest.spec
        if (plan.blocks, plan.loop) != (spec.blocks, spec.loop):
            raise InvalidRequest(
                f"plan is for {plan.blocks} blocks and loop {plan.loop.begin}:{plan.loop.end}, the bundle has "
                f"{spec.blocks} and {spec.loop.begin}:{spec.loop.end}; make one with pipeline.plan(…)"
            )
        return plan

    def _start(
        self, pictures: int, seed: int | Sequence[int], latents: ArrayLike | None, source: NoiseSource | str
    ) -> NDArray[np.float32]:
        shape = (pictures, *self.manifest.spec.latent)
        if latents is not None:
            array = as_array("latents", latents)
            if array.shape != shape or array.dtype != np.float32:
                raise InvalidRequest(f"latents are {array.dtype} {array.shape}, expected float32 {shape}")
            if not np.isfinite(array).all():
                raise InvalidRequest("latents hold NaN or infinity; pass noise of unit variance")
            return array
        try:
            source = NoiseSource(source)
        except ValueError as error:
            raise InvalidRequest(f"noise {source!r} is unknown; use {' or '.join(NoiseSource)}") from error
        if isinstance(seed, Integral) and not isinstance(seed, bool):
            return draw_noise(shape, int(seed), source)
        if not isinstance(seed, Sequence):
            raise InvalidRequest(f"seed is {seed!r}, expected a whole number or a list of them")
        if len(seed) != pictures:
            raise InvalidRequest(f"{len(seed)} seeds for {pictures} pictures; give one seed, or one for each picture")
        return noise_per_picture(shape, seed, source)
