"""The public face of the runtime: load a bundle, generate, close."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from threading import Event
from time import perf_counter_ns
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ilf_trt.contract.bundle import TOKENIZER_FILE, Bundle
from ilf_trt.contract.class_names import labels_of
from ilf_trt.contract.conditions import check_conditions, row_conditions
from ilf_trt.contract.manifest import Manifest
from ilf_trt.contract.plan import Ratio, Rule, StepPlan, make_plan
from ilf_trt.contract.ports import NEGATIVE, PICTURES
from ilf_trt.contract.progress import Progress
from ilf_trt.errors import InvalidRequest
from ilf_trt.runtime.batches import RunBatch, run_batches
from ilf_trt.runtime.engine import EngineKind
from ilf_trt.runtime.host import Host
from ilf_trt.runtime.loading import CLOSED, Backend, Loading, Part, Resident, Sequential
from ilf_trt.runtime.picture.decoder import Decoder
from ilf_trt.runtime.picture.png import pixels_from_latents
from ilf_trt.runtime.picture.size import PictureSize
from ilf_trt.runtime.progress import StepWatch
from ilf_trt.runtime.result import Result
from ilf_trt.runtime.session import KEPT_TRAJECTORIES, Session
from ilf_trt.runtime.single_graph import run_single_graph
from ilf_trt.runtime.start_noise import NoiseSource, checked_latents, is_on_gpu, noise_from_seed
from ilf_trt.runtime.text.prompts import Prompt, Prompts, embed
from ilf_trt.runtime.text.tokenizer import Tokenizer
from ilf_trt.runtime.timings import Timings
from ilf_trt.runtime.trajectory import Job

DEFAULT_SESSIONS = 4
PIXEL_CHANNELS = (1, 3)


class Pipeline:
    """A loaded bundle. Threads may share it: each generation borrows a session, all share the engines."""

    def __init__(self, bundle: Bundle, loading: Loading, description: str, *, on_gpu: bool) -> None:
        """`loading` lends sessions for the bundle's graphs; the pipeline closes it."""
        self.bundle = bundle
        self.device = description
        self._loading = loading
        self._on_gpu = on_gpu
        self._closed = False
        text = bundle.manifest.text
        self._tokens = None if text is None else Tokenizer(bundle.path / TOKENIZER_FILE, text)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str = "cpu",
        engine: EngineKind | str | None = None,
        threads: int = 0,
        sessions: int = DEFAULT_SESSIONS,
        kept: int = KEPT_TRAJECTORIES,
        low_memory: bool = False,
        check_hashes: bool = True,
    ) -> Self:
        """Check a bundle and load its graphs.

        `device` is cpu, cuda or cuda:N. On a GPU the bundle's own engines run, those of the first target that fits it;
        ONNX Runtime's CUDA provider when it has none. `engine` names one: tensorrt, tensorrt-rtx or onnxruntime.
        `threads` 0 leaves the number of the CPU's engine threads to the library (1 is faster for tiny models); at most
        `sessions` generations run at once, each in memory of its own, where the last `kept` kinds of request (plan,
        size and number of pictures) stay bound. `low_memory` loads text encoder, transformer and decoder one after
        another for each generation and frees them between, which costs their loading every time.
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

        def load_backend(graphs: Sequence[str] | None = None) -> Backend:
            if ordinal is None:
                return Host.open(bundle, threads=threads, graphs=graphs)
            from ilf_trt.runtime.gpu.device import Device

            return Device.open(bundle, ordinal, kind, graphs=graphs)

        on_gpu = ordinal is not None
        if low_memory:
            return cls(bundle, Sequential(load_backend), f"{device}, one part at a time", on_gpu=on_gpu)
        return cls.of(bundle, load_backend(), sessions=sessions, kept=kept)

    @classmethod
    def of(
        cls, bundle: Bundle, backend: Backend, *, sessions: int = DEFAULT_SESSIONS, kept: int = KEPT_TRAJECTORIES
    ) -> Self:
        """A pipeline for a bundle that `backend` has loaded; the pipeline closes the backend."""
        return cls(bundle, Resident(backend, sessions, kept), backend.description, on_gpu=backend.on_gpu)

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    def run(self, graph: str, arrays: Mapping[str, ArrayLike]) -> dict[str, NDArray[Any]]:
        """One graph alone, once, for tools: arrays by input port -> new arrays by output port; bfloat16 as float32.

        Raises PortMismatch for a missing array or a wrong shape, InvalidRequest for an unknown graph.
        """
        return run_single_graph(self.manifest, self._loading, graph, arrays)

    def warm_up(
        self, pictures: int | None = None, plan: StepPlan | None = None, *, size: Sequence[int] | None = None
    ) -> None:
        """Generate once in every session and throw it away, so that no later request of this kind waits for binding.

        `pictures` is the batch's optimum when it is not given. Call it before requests come in; it does nothing for a
        pipeline of low memory, which keeps nothing.
        """
        if not isinstance(self._loading, Resident):
            return
        count = self.manifest.batch.opt if pictures is None else pictures
        nothing: dict[str, Any]
        if self.manifest.text is None:
            ports = self.manifest.spec.conditions
            nothing = {port.name: np.zeros(port.resolve({PICTURES: count}), port.dtype) for port in ports}
        else:
            nothing = {"prompt": [""] * count}
        with self._loading.each_session() as turns:
            for _ in turns:
                self.generate(plan=plan, size=size, **nothing)

    def generate(
        self,
        prompt: Prompt | None = None,
        *,
        negative_prompt: Prompt | None = None,
        class_labels: Any = None,
        size: Sequence[int] | None = None,
        steps: int | None = None,
        seed: int | Sequence[int] = 0,
        latents: ArrayLike | None = None,
        noise: NoiseSource | str = NoiseSource.TORCH,
        guidance_scale: float | None = None,
        plan: StepPlan | None = None,
        clean_captions: bool = False,
        binning: bool = True,
        decode: bool = True,
        progress: Progress | None = None,
        cancel: Event | None = None,
        profile: bool = False,
        on_device: bool = False,
        **conditions: Any,
    ) -> Result:
        """Pictures for prompts, for classes (by number or name), or for `conditions` under the names of the bundle's.

        `size` is (height, width) in pixels, one that the bundle was built for; with `binning` a model of several
        trained sizes makes the nearest of them, and the picture is scaled and cropped to what was asked. More pictures
        than the bundle's batch run in turns. `guidance_scale` 1 runs every picture once instead of twice.
        Start noise: `seed` draws the whole batch as diffusers does with one generator; a list draws each picture from
        its own; `latents` (B, C, H, W) of unit variance replaces both, also from a GPU by DLPack. `steps` or `plan`
        (see `self.plan`) replace the bundle's. `decode` false leaves latents as they are. Each step
        calls `progress("step", done, total)`; `cancel` ends the generation at the next step once it is set. `profile`
        times every graph on a GPU, which costs the launch as one, as `progress` and `cancel` do; `on_device` leaves
        the latents there, as a `DeviceArray`, and decodes nothing.
        Raises InvalidRequest for anything that does not fit, Cancelled, EngineError when an engine fails, DeviceError
        and its kinds: after OutOfMemory the pipeline is as usable as before.
        """
        self._check_open()
        spec, batch = self.manifest.spec, self.manifest.batch
        plan = self._plan_of(plan, steps)
        scale = self._scale(guidance_scale)
        guided = spec.guidance and (scale != 1 or batch.fixed)
        frame = PictureSize.of(self.manifest, size, binning=binning)
        if on_device and not self._on_gpu:
            raise InvalidRequest("on_device needs a pipeline on a GPU; load the bundle with device='cuda:0'")
        asked, cut, text_ms = self._asked(
            prompt, negative_prompt, class_labels, conditions, frame, clean=clean_captions, guided=guided
        )
        unused = () if guided else tuple(port for port in spec.conditions if port.name.startswith(NEGATIVE))
        ports = tuple(port for port in spec.conditions if port not in unused)
        names = {port.name for port in unused}
        arrays, pictures = check_conditions(ports, {name: v for name, v in asked.items() if name not in names})
        noises = self._start((pictures, spec.latent[0], *frame.cells), seed, latents, noise)
        chunks = list(run_batches(pictures, batch))
        if len(chunks) > 1 and (on_device or is_on_gpu(noises)):
            raise InvalidRequest(
                f"{pictures} pictures are more than a run's {batch.max}, and latents on a GPU are not split; pass fewer"
            )
        watch = StepWatch(len(plan.steps) * len(chunks), progress, cancel) if progress or cancel else None
        job = Job(plan, pictures, frame.cells, guided)
        made, timings = self._trajectories(
            chunks, job, arrays, noises, scale, watch, profile=profile, on_device=on_device
        )
        pixels, decode_ms = (None, 0.0) if on_device or not decode else self._decoded(made, frame)
        times = timings.with_parts({"text": text_ms} if text_ms else {}, {"decode": decode_ms} if decode_ms else {})
        return Result(made, pixels, times, plan, cut)

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
        if steps is not None and (not isinstance(steps, Integral) or isinstance(steps, bool) or steps < 1):
            raise InvalidRequest(f"steps is {steps!r}, it must be a whole number of at least 1")
        try:
            rule = old.rule if rule is None else Rule(rule)
            ratio = old.ratio if ratio is None else Ratio(ratio)
        except ValueError as error:
            raise InvalidRequest(f"{error}; rules are {', '.join(Rule)}, ratios {', '.join(Ratio)}") from error
        return make_plan(
            self.manifest.scheduler,
            old.requested_steps if steps is None else int(steps),
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
        self._loading.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise InvalidRequest(CLOSED)

    @contextmanager
    def _session(self, part: Part) -> Iterator[Session]:
        with self._loading.session(part) as session:
            self._check_open()
            yield session

    def _plan_of(self, plan: StepPlan | None, steps: int | None) -> StepPlan:
        if plan is None:
            return self.manifest.plan if steps is None else self.plan(steps)
        if steps is not None:
            raise InvalidRequest("steps and plan are both given; give one of them")
        spec = self.manifest.spec
        if (plan.blocks, plan.loop) != (spec.blocks, spec.loop):
            raise InvalidRequest(
                f"plan is for {plan.blocks} blocks and loop {plan.loop.begin}:{plan.loop.end}, the bundle has "
                f"{spec.blocks} and {spec.loop.begin}:{spec.loop.end}; make one with pipeline.plan(…)"
            )
        return plan

    def _scale(self, guidance_scale: float | None) -> float:
        scale = self.manifest.guidance_scale if guidance_scale is None else guidance_scale
        if not isinstance(scale, Real) or not abs(scale) <= float(np.finfo(np.float32).max):
            raise InvalidRequest(f"guidance_scale is {scale}, it must be finite")
        return float(scale)

    def _asked(
        self,
        prompt: Prompt | None,
        negative: Prompt | None,
        labels: Any,
        conditions: Mapping[str, Any],
        frame: PictureSize,
        *,
        clean: bool,
        guided: bool,
    ) -> tuple[dict[str, Any], tuple[str, ...], float]:
        """Everything that is asked for, under the names of the bundle's conditions; what was cut off; and ms for it."""
        ports = {port.name: port for port in self.manifest.spec.conditions}
        asked, text_ms = dict(conditions), 0.0
        cut: tuple[str, ...] = ()
        if labels is not None:
            if prompt is not None:
                raise InvalidRequest("prompt and class_labels are both given; a model takes one of them")
            asked["class_labels"] = self._labels(labels)
        if negative is not None and prompt is None:
            raise InvalidRequest("negative_prompt is given without a prompt; give both")
        if prompt is not None:
            if self.manifest.text is None or self._tokens is None:
                takes = ", ".join(ports)
                raise InvalidRequest(f"this bundle has no text encoder; it takes {takes}, or build it with --pipeline")
            prompts = Prompts.of(prompt, negative, clean=clean)
            begin = perf_counter_ns()
            with self._session("text") as session:
                made = embed(prompts, self._tokens, self.manifest.text, self.manifest.batch, session, guided=guided)
            text_ms = (perf_counter_ns() - begin) / 1e6
            double = sorted(asked.keys() & made.conditions.keys())
            if double:
                raise InvalidRequest(f"prompt and {double[0]} are both given; give one of them")
            asked, cut = asked | made.conditions, made.cut
        pictures = max((len(value) for value in asked.values() if hasattr(value, "__len__")), default=0)
        height, width = frame.native
        for name, row in (("resolution", [height, width]), ("aspect_ratio", [height / width])):
            if name in ports and name not in asked and pictures:
                asked[name] = np.tile(np.array(row, np.float32), (pictures, 1))
        return asked, cut, text_ms

    def _labels(self, labels: Any) -> Any:
        """Numbers as they are, one label as a list of one, and names by the bundle's own."""
        asked = [labels] if isinstance(labels, str | int) else labels
        if isinstance(asked, Sequence) and any(isinstance(label, str) for label in asked):
            return labels_of(asked, self.manifest.picture.names, self.manifest.spec.null)
        return asked

    def _start(
        self, shape: tuple[int, ...], seed: int | Sequence[int], latents: ArrayLike | None, source: NoiseSource | str
    ) -> Any:
        if latents is None:
            return noise_from_seed(shape, seed, source)
        if not is_on_gpu(latents):
            return checked_latents(latents, shape)
        if not self._on_gpu:
            raise InvalidRequest("latents are on a GPU, the pipeline on the CPU; pass a numpy array")
        return latents

    def _trajectories(
        self,
        chunks: list[RunBatch],
        job: Job,
        arrays: Mapping[str, NDArray[Any]],
        noises: Any,
        scale: float,
        watch: StepWatch | None,
        *,
        profile: bool,
        on_device: bool,
    ) -> tuple[Any, Timings]:
        """The latents of all chunks, and their timings together."""
        made, timings = [], []
        rows = partial(row_conditions, self.manifest.spec, guided=job.guided)
        with self._session("transformer") as session:
            for chunk in chunks:
                trajectory = session.trajectory(replace(job, pictures=chunk.rows))
                latents, times = trajectory.run(
                    noises if is_on_gpu(noises) else chunk.take(noises),
                    rows(chunk.take_all(arrays)),
                    scale,
                    profile=profile,
                    on_device=on_device,
                    watch=watch,
                )
                whole = on_device or chunk.pictures == chunk.rows
                made.append(latents if whole else latents[: chunk.pictures].copy())
                timings.append(times)
        return made[0] if len(made) == 1 else np.concatenate(made), Timings.total(timings)

    def _decoded(self, latents: NDArray[np.float32], frame: PictureSize) -> tuple[NDArray[np.uint8] | None, float]:
        """The pictures of latents, and ms for it; none of a model whose latents are no pixels and have no decoder."""
        spec = self.manifest.decoder
        if spec is None:
            return (pixels_from_latents(latents) if latents.shape[1] in PIXEL_CHANNELS else None), 0.0
        begin = perf_counter_ns()
        with self._session("decoder") as session:

            def run(tile: NDArray[np.float32]) -> NDArray[np.float32]:
                height, width = tile.shape[2:]
                symbols = {"H": height, "W": width}
                symbols |= {f"{spec.scale}{name}": side * spec.scale for name, side in symbols.items()}
                call = session.call(spec.graph, symbols)
                call.inputs["latents"][:] = tile
                call()
                return call.outputs["shades"]

            pixels = Decoder(run, spec).decode(latents, frame.requested if frame.requested != frame.native else None)
        return pixels, (perf_counter_ns() - begin) / 1e6


def _ordinal(device: str) -> int | None:
    """`"cuda:1"` -> 1, `"cuda"` -> 0, `"cpu"` -> None."""
    if device == "cpu":
        return None
    name, colon, number = str(device).partition(":")
    if name != "cuda" or (colon and not (number.isascii() and number.isdecimal())):
        raise InvalidRequest(f"device {device!r} is unknown; it is cpu, cuda or cuda:N")
    return int(number or 0)
