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
from ilf_trt.contract import Graph, Port
from ilf_trt.errors import InvalidRequest, PortMismatch
from ilf_trt.manifest import Manifest
from ilf_trt.schedule import Ratio, Rule, StepPlan, make_plan

from .compatibility import EngineKind
from .device import Device
from .device_array import is_on_gpu
from .host import Host
from .noise import NoiseSource, noise_per_picture
from .noise import noise as draw_noise
from .session import Session, Timings

DEFAULT_SESSIONS = 4


@dataclass(frozen=True, slots=True)
class Result:
    """What `generate` gives: latents float32 (B, C, H, W), how long it took, and the plan that it followed.

    The latents are a numpy array, or with `on_device` a `DeviceArray`.
    """

    latents: Any
    timings: Timings
    plan: StepPlan


class Pipeline:
    """A loaded bundle. Threads may share it: each generation borrows a session, all share the engines."""

    def __init__(self, bundle: Bundle, place: Host | Device, *, sessions: int = DEFAULT_SESSIONS) -> None:
        """`place` is where the bundle was loaded; it is closed with the pipeline."""
        self.bundle = bundle
        self._place = place
        self._closed = False
        self._sessions = sessions if place.max_sessions is None else min(sessions, place.max_sessions)
        self._pool: LifoQueue[Session | None] = LifoQueue()
        for _ in range(self._sessions):
            self._pool.put(None)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str = "cpu",
        engine: EngineKind | str | None = None,
        threads: int = 0,
        sessions: int = DEFAULT_SESSIONS,
        check_hashes: bool = True,
    ) -> Self:
        """Check a bundle and load its graphs.

        `device` is cpu, cuda or cuda:N. On a GPU the bundle's own engines run, those of the first target that fits it;
        ONNX Runtime's CUDA provider when it has none. `engine` names one: tensorrt, tensorrt-rtx or onnxruntime.
        `threads` 0 leaves the number of the CPU's engine threads to the library (1 is faster for tiny models); at most
        `sessions` generations run at once, each in memory of its own.
        Raises BundleError, InvalidRequest, PortMismatch, EngineError for engines that are not for this machine,
        MissingDependency, DeviceError and its kinds.
        """
        ordinal = _ordinal(device)
        kind = None if engine is None else EngineKind.parse(engine)
        if ordinal is None and kind not in (None, EngineKind.ONNXRUNTIME):
            raise InvalidRequest(f"{kind} engines run on a GPU; pass device='cuda:0', or engine='onnxruntime'")
        if sessions < 1:
            raise InvalidRequest(f"sessions is {sessions}, it must be at least 1")
        bundle = Bundle.open(path, check_hashes=check_hashes)
        if ordinal is None:
            return cls(bundle, Host.open(bundle, threads=threads), sessions=sessions)
        return cls(bundle, Device.open(bundle, ordinal, kind), sessions=sessions)

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    @property
    def device(self) -> str:
        """Where it runs and on what, for people to read."""
        return self._place.description

    def run(self, graph: str, arrays: Mapping[str, ArrayLike]) -> dict[str, NDArray[Any]]:
        """One graph alone, once, for tools: arrays by input port -> new arrays by output port; bfloat16 as float32.

        Raises PortMismatch for a missing array or a wrong shape, InvalidRequest for an unknown graph.
        """
        border = next((each for each in self.manifest.graphs if each.name == graph), None)
        if border is None:
            names = ", ".join(each.name for each in self.manifest.graphs)
            raise InvalidRequest(f"the bundle has no graph {graph!r}; it has {names}")
        given = {port.name: _as_port(graph, port, arrays.get(port.name)) for port in border.inputs}
        sizes = _sizes(border, given)
        outputs = {port.name: np.zeros(port.resolve(sizes), port.array_dtype) for port in border.outputs}
        self._place.run(border, given, outputs)
        return outputs

    def warm_up(self, pictures: int | None = None, plan: StepPlan | None = None) -> None:
        """Generate once in every session and throw it away, so that no later request of this kind waits for binding.

        `pictures` is the batch's optimum when it is not given. Call it before requests come in.
        """
        count = self.manifest.batch.opt if pictures is None else pictures
        ports = self.manifest.spec.conditions
        nothing: dict[str, Any] = {port.name: np.zeros(port.resolve({"B": count}), port.dtype) for port in ports}
        cold = [self._pool.get() for _ in range(self._sessions)]
        try:
            while cold:
                self._pool.put(cold.pop())  # the last one in is the first one out
                self.generate(plan=plan, **nothing)
        finally:
            for session in cold:
                self._pool.put(session)

    def generate(
        self,
        *,
        seed: int | Sequence[int] = 0,
        latents: ArrayLike | None = None,
        noise: NoiseSource | str = NoiseSource.TORCH,
        guidance_scale: float | None = None,
        plan: StepPlan | None = None,
        profile: bool = False,
        on_device: bool = False,
        **conditions: Any,
    ) -> Result:
        """Latents for the pictures that `conditions` ask for, under the names of the bundle's condition ports.

        Start noise: `seed` draws the whole batch as diffusers does with one generator; a list draws each picture from
        its own; `latents` (B, C, H, W) of unit variance replaces both, also from a GPU by DLPack. `plan` (see
        `self.plan`) replaces the bundle's. `profile` times every graph on a GPU, which costs the launch as one;
        `on_device` leaves the latents there, as a `DeviceArray`.
        Raises InvalidRequest for anything that does not fit, EngineError when an engine fails, DeviceError and its
        kinds: after OutOfMemory the pipeline is as usable as before.
        """
        self._check_open()
        plan = self.manifest.plan if plan is None else self._checked_plan(plan)
        arrays, pictures = check_conditions(self.manifest.spec.conditions, conditions)
        self.manifest.batch.check(pictures)
        start = self._start(pictures, seed, latents, noise)
        scale = self.manifest.guidance_scale if guidance_scale is None else guidance_scale
        if not isinstance(scale, Real) or not abs(scale) <= float(np.finfo(np.float32).max):
            raise InvalidRequest(f"guidance_scale is {scale}, it must be finite")
        if on_device and isinstance(self._place, Host):
            raise InvalidRequest("on_device needs a pipeline on a GPU; load the bundle with device='cuda:0'")
        session = self._pool.get()
        try:
            self._check_open()
            session = session or self._place.session()
            trajectory = session.trajectory(plan, pictures)
            result, timings = trajectory.run(start, arrays, scale, profile=profile, on_device=on_device)
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
        """Free everything, after the generations that still run; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        for _ in range(self._sessions):
            session = self._pool.get()
            if session is not None:
                session.close()
        self._place.close()
        for _ in range(self._sessions):
            self._pool.put(None)  # for threads that wait: they find it closed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise InvalidRequest("this pipeline is closed; load the bundle again")

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
    ) -> Any:
        shape = (pictures, *self.manifest.spec.latent)
        if latents is not None and is_on_gpu(latents):
            if isinstance(self._place, Host):
                raise InvalidRequest("latents are on a GPU, the pipeline on the CPU; pass a numpy array")
            return latents
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


def _ordinal(device: str) -> int | None:
    """`"cuda:1"` -> 1, `"cuda"` -> 0, `"cpu"` -> None."""
    if device == "cpu":
        return None
    name, colon, number = str(device).partition(":")
    if name != "cuda" or (colon and not (number.isascii() and number.isdecimal())):
        raise InvalidRequest(f"device {device!r} is unknown; it is cpu, cuda or cuda:N")
    return int(number or 0)


def _as_port(graph: str, port: Port, array: ArrayLike | None) -> NDArray[Any]:
    if array is None:
        raise PortMismatch(f"{graph}: input {port.name!r} is missing, it is {port.dtype} {port.shape}")
    found = np.ascontiguousarray(array, dtype=port.array_dtype)
    if len(found.shape) != len(port.shape) or any(
        isinstance(want, int) and want != got for want, got in zip(port.shape, found.shape, strict=True)
    ):
        raise PortMismatch(f"{graph}: input {port.name!r} is {found.shape}, expected {port.shape}")
    return found


def _sizes(graph: Graph, arrays: Mapping[str, NDArray[Any]]) -> dict[str, int]:
    """Every symbolic dimension of a graph by what the inputs have."""
    sizes: dict[str, int] = {}
    for port in graph.inputs:
        for dim, size in zip(port.shape, arrays[port.name].shape, strict=True):
            if isinstance(dim, str) and sizes.setdefault(dim, size) != size:
                raise PortMismatch(f"{graph.name}: input {port.name!r} has {dim} = {size}, others have {sizes[dim]}")
    if "B" in sizes:
        sizes["2B"] = 2 * sizes["B"]
    return sizes
