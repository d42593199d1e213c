"""The public face of the runtime: load a bundle, generate, close."""

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from threading import Event
from time import perf_counter_ns
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ilf_trt import __version__
from ilf_trt.contract.bundle import TOKENIZER_FILE, Bundle
from ilf_trt.contract.device import ordinal_of
from ilf_trt.contract.manifest import Manifest
from ilf_trt.contract.plan import Ratio, Rule, StepPlan
from ilf_trt.contract.ports import DECODE, TEXT
from ilf_trt.contract.progress import Progress
from ilf_trt.contract.spec import TextSpec
from ilf_trt.errors import InvalidRequest, shown, told

from .arguments import MOST_PICTURES, array_of, flag_of, path_of, seconds_of, text_of, whole_of
from .batches import RunBatch, run_batches
from .engine import EngineKind
from .host import Host
from .lending import Wait
from .loading import Backend, Loading, Resident, Sequential, Sessions
from .memory import MemoryLimit, limit_bytes
from .picture.decoder import Decoder, decode_tile
from .picture.png import pixels_from_latents
from .picture.size import PictureSize
from .progress import StepWatch
from .provenance import NAME_CHARS, Origin, is_folder_name
from .request import Request, changed_plan, picture_size
from .result import Result
from .session import KEPT_TRAJECTORIES
from .single_graph import run_single_graph
from .start_noise import checked_latents, is_on_gpu, noise_from_seed
from .text.caption import check_cleaning
from .text.prompts import EmbeddedText, Prompt, embed
from .text.tokenizer import Tokenizer
from .timings import Timings
from .trajectory import Job, RunOptions

DEFAULT_SESSIONS = 4
MOST_SESSIONS, MOST_KEPT = 1024, 1024
PIXEL_CHANNELS = (1, 3)


class Pipeline:
    """A loaded bundle. Threads may share it: each generation borrows a session, all share the engines.

    Any mix of `generate`, `run`, `warm_up`, `plan` and `close` from several threads ends, and gives what one thread
    alone gets. Requests are served in the order in which they come. In a fork, all but `plan` and `close` raise
    InvalidRequest.
    """

    def __init__(
        self, bundle: Bundle, loading: Loading, description: str, *, on_gpu: bool, most_bytes: int | None = None
    ) -> None:
        """`loading` lends sessions for the bundle's graphs; the pipeline closes it."""
        self.bundle = bundle
        self.device = description
        self._loading = loading
        self._on_gpu = on_gpu
        self._limit = MemoryLimit(bundle.manifest, limit_bytes(most_bytes), on_gpu=on_gpu)
        text = bundle.manifest.text
        try:
            self._tokens = None if text is None else _tokenizer(bundle, text)
            if bundle.manifest.clean_captions:
                check_cleaning()
        except BaseException:
            loading.close()
            raise

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
        max_memory: int | None = None,
        check_hashes: bool = True,
    ) -> Self:
        """Check a bundle and load its graphs.

        `device` is cpu, cuda or cuda:N. On a GPU the bundle's own engines run, those of the first target that fits it;
        ONNX Runtime's CUDA provider when it has none. `engine` names one: tensorrt, tensorrt-rtx or onnxruntime.
        `threads` 0 leaves the number of the CPU's engine threads to the library (1 is faster for tiny models); at most
        `sessions` generations run at once, each in memory of its own, where the last `kept` kinds of request (plan,
        size and number of pictures) stay bound. `low_memory` loads text encoder, transformer and decoder one after
        another for each generation and frees them between, which costs their loading every time. `max_memory` is the
        most bytes that a generation may take on the host, and that the bundle's files may have; by default a share of
        the machine's. A request that needs more is refused before it takes any.
        Raises BundleError, InvalidRequest, PortMismatch, EngineError for engines that are not for this machine,
        MissingDependency, DeviceError and its kinds.
        """
        ordinal = ordinal_of(text_of("device", device, "cpu, cuda or cuda:N"))
        kind = None if engine is None else EngineKind.parse(engine)
        if ordinal is None and kind not in (None, EngineKind.ONNXRUNTIME):
            raise InvalidRequest(f"{kind} engines run on a GPU; pass device='cuda:0', or engine='onnxruntime'")
        sessions, kept = _capacity(sessions, kept)
        threads = whole_of("threads", threads, least=0, most=processors())
        low_memory, check_hashes = flag_of("low_memory", low_memory), flag_of("check_hashes", check_hashes)
        most_bytes = limit_bytes(max_memory)
        bundle = Bundle.open(path_of("path", path), check_hashes=check_hashes, max_bytes=most_bytes)
        MemoryLimit(bundle.manifest, most_bytes, on_gpu=ordinal is not None).check_smallest()

        def load_backend(graphs: Sequence[str] | None = None) -> Backend:
            if ordinal is None:
                return Host.open(bundle, threads=threads, graphs=graphs)
            from .gpu.device import Device

            return Device.open(bundle, ordinal, kind, graphs=graphs)

        on_gpu = ordinal is not None
        if low_memory:
            return cls(
                bundle, Sequential(load_backend), f"{device}, one part at a time", on_gpu=on_gpu, most_bytes=most_bytes
            )
        return cls.of(bundle, load_backend(), sessions=sessions, kept=kept, most_bytes=most_bytes)

    @classmethod
    def of(
        cls,
        bundle: Bundle,
        backend: Backend,
        *,
        sessions: int = DEFAULT_SESSIONS,
        kept: int = KEPT_TRAJECTORIES,
        most_bytes: int | None = None,
    ) -> Self:
        """A pipeline for a bundle that `backend` has loaded; the pipeline closes the backend."""
        loading = Resident(backend, *_capacity(sessions, kept))
        return cls(bundle, loading, backend.description, on_gpu=backend.on_gpu, most_bytes=most_bytes)

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
        """Generate once in every session, so that no later request of this kind waits for memory to be bound.

        `pictures` is the batch's optimum by default. Call it before requests come in: it waits its turn for one session
        after another. It does nothing for a pipeline of low memory, which keeps nothing.
        """
        self._loading.check_open()
        batch = self.manifest.batch.opt
        count = batch if pictures is None else whole_of("pictures", pictures, most=MOST_PICTURES)
        example: dict[str, Any] = {"prompt": [""] * count}
        if self.manifest.text is None:
            native = picture_size(self.manifest, size, binning=True).native
            example = self.manifest.spec.conditioning.example(count, native, guidance=self.manifest.spec.guidance)
        wanted = Request.of(self.manifest, plan=plan, size=size, **example)
        for lent in self._loading.lend_each():
            self._generate(wanted, lent)

    def inputs(
        self, /, prompt: Prompt | None = None, **request: Any
    ) -> tuple[NDArray[np.float32], dict[str, NDArray[Any]]]:
        """The start noise (B, C, H, W) and the conditions by port that `generate` would run for the same request.

        `generate(latents=noise, **conditions)` then gives the same latents, and embeds nothing. Raises as `generate`.
        """
        self._loading.check_open()
        wanted = Request.of(self.manifest, prompt, **request)
        conditions, _, noise = self._drawn(wanted)
        if wanted.prompts is not None:
            with self._loading.lend() as sessions:
                text, _ = self._embed(wanted, sessions)
            conditions, _ = wanted.conditions_of(self.manifest, text.conditions)
        return noise, conditions

    def generate(
        self,
        /,
        prompt: Prompt | None = None,
        *,
        decode: bool = True,
        progress: Progress | None = None,
        cancel: Event | None = None,
        timeout: float | None = None,
        profile: bool = False,
        on_device: bool = False,
        **request: Any,
    ) -> Result:
        """Pictures for prompts, for classes, or for conditions; `request` takes everything that `Request.of` takes.

        The most used: `class_labels`, `negative_prompt`, `size`, `steps`, `plan`, `guidance_scale`, `seed`, `latents`.
        More pictures than the bundle's batch run one batch after another. `decode` false leaves latents as they are.
        `progress` is told every step; an exception that it raises ends the generation and comes out as it is. `cancel`
        ends the generation before its next step once it is set, also while it waits for a session; `timeout` bounds
        that wait, in seconds. `profile` times every graph on a GPU, which then cannot launch the trajectory as one,
        like `progress` and `cancel`. `on_device` leaves the latents on the GPU as a `DeviceArray` and decodes nothing.

        Raises InvalidRequest for anything that does not fit, Cancelled, TimedOut, NonFinite, EngineError when an engine
        fails, DeviceError and its kinds: after OutOfMemory the pipeline is as usable as before.
        """
        self._loading.check_open()
        decode, profile, on_device = (
            flag_of(name, value) for name, value in (("decode", decode), ("profile", profile), ("on_device", on_device))
        )
        if progress is not None and not callable(progress):
            raise InvalidRequest(f"progress is {told(progress)}, expected a function of (what, done, total, detail)")
        if cancel is not None and not isinstance(cancel, Event):
            raise InvalidRequest(f"cancel is {told(cancel)}, expected a threading.Event")
        wait = Wait(seconds_of("timeout", timeout), cancel)
        if on_device and not self._on_gpu:
            raise InvalidRequest("on_device needs a pipeline on a GPU; load the bundle with device='cuda:0'")
        wanted = Request.of(self.manifest, prompt, **request)
        wait.check_cancel()
        return self._generate(
            wanted,
            self._loading.lend(wait),
            decode=decode and not on_device,
            progress=progress,
            cancel=cancel,
            profile=profile,
            on_device=on_device,
        )

    def decode(self, latents: NDArray[np.float32], /, *, size: Sequence[int] | None = None) -> NDArray[np.uint8] | None:
        """The pixels of latents that this bundle's model made, uint8 (B, H, W, 3 or 1); None without a decoder.

        `size` is that of the request that the latents are of. Raises InvalidRequest for latents of another shape, and
        NaN or infinity in them.
        """
        self._loading.check_open()
        place = picture_size(self.manifest, size, binning=True)
        array = array_of("latents", latents)
        expected = (self.manifest.spec.latent[0], *place.cells)
        checked_latents(array, (*array.shape[:1], *expected))
        watch = StepWatch(0, None, None)
        with self._loading.lend() as sessions:
            pixels, _ = self._decode(array, place, watch, sessions)
        return pixels

    def plan(
        self,
        steps: int | None = None,
        *,
        feedback: str | None = None,
        rule: Rule | str | None = None,
        ratio: Ratio | str | None = None,
    ) -> StepPlan:
        """The bundle's plan with some of its settings replaced; nothing is rebuilt. Raises InvalidRequest."""
        return changed_plan(self.manifest, steps, feedback=feedback, rule=rule, ratio=ratio)

    def close(self, timeout: float | None = None) -> None:
        """Refuse new requests and those that wait, and free everything once the running generations have ended.

        Raises TimedOut if they run for more than `timeout` seconds; the last of them then frees everything. Inside of a
        generation, such as from its `progress`, it does not wait: that generation goes on, and the last one frees. In a
        fork and a second time it does nothing.
        """
        self._loading.close(seconds_of("timeout", timeout))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _generate(
        self,
        wanted: Request,
        lent: AbstractContextManager[Sessions],
        *,
        decode: bool = True,
        progress: Progress | None = None,
        cancel: Event | None = None,
        profile: bool = False,
        on_device: bool = False,
    ) -> Result:
        """Check and draw what can be before the wait for a session, then run all parts of the bundle in it."""
        conditions, pictures, noise = self._drawn(wanted)
        chunks = list(run_batches(pictures, self.manifest.batch))
        if len(chunks) > 1 and (on_device or is_on_gpu(noise)):
            raise InvalidRequest(
                f"{pictures} pictures are more than a run's {self.manifest.batch.max}, and latents on a GPU are not "
                "split; pass fewer"
            )
        watch = StepWatch(len(wanted.plan.steps) * len(chunks), progress, cancel)
        watched = progress is not None or cancel is not None
        options = RunOptions(profile=profile, on_device=on_device, watch=watch if watched else None)
        with lent as sessions:
            text, text_ms = self._embed(wanted, sessions)
            if wanted.prompts is not None:
                conditions, _ = wanted.conditions_of(self.manifest, text.conditions)
            watch.check()
            latents, timings = self._sample(wanted, chunks, conditions, noise, options, sessions)
            pixels, decode_ms = self._decode(latents, wanted.size, watch, sessions) if decode else (None, 0.0)
        timings = timings.with_parts({TEXT: text_ms} if text_ms else {}, {DECODE: decode_ms} if decode_ms else {})
        return Result(latents, pixels, timings, wanted, self._origin, text.cut)

    @cached_property
    def _origin(self) -> Origin:
        """Known once a generation ran."""
        device, library = self._loading.runs_on
        name = os.path.basename(os.path.abspath(self.bundle.path))  # noqa: PTH100, PTH119
        return Origin(
            bundle=name if is_folder_name(name) else "",
            bundle_sha256=self.manifest.digest,
            device=shown(device, NAME_CHARS),
            library=shown(library, NAME_CHARS),
            ilf_trt=__version__,
        )

    def _drawn(self, request: Request) -> tuple[dict[str, NDArray[Any]], int, Any]:
        """The conditions, none for prompts, which wait for the text encoder; the number of pictures; the start noise.

        Refuses a request for which there is not enough memory before it draws.
        """
        conditions: dict[str, NDArray[Any]] = {}
        if request.prompts is None:
            conditions, pictures = request.conditions_of(self.manifest, {})
        else:
            pictures = len(request.prompts.positive)
        self._check_memory(request, pictures)
        return conditions, pictures, self._start_noise(request, pictures)

    def _check_memory(self, request: Request, pictures: int) -> None:
        batch = self.manifest.batch
        rows = min(max(pictures, batch.min), batch.max)
        self._limit.check(Job(request.plan, rows, request.size.cells, request.guided), pictures, request.size)

    def _embed(self, request: Request, sessions: Sessions) -> tuple[EmbeddedText, float]:
        """The text of the request's prompts, if it has any, and the ms that it took."""
        if request.prompts is None or self._tokens is None or self.manifest.text is None:
            return EmbeddedText({}, ()), 0.0
        begin = perf_counter_ns()
        with sessions("text") as session:
            text = embed(
                request.prompts, self._tokens, self.manifest.text, self.manifest, session, guided=request.guided
            )
        return text, (perf_counter_ns() - begin) / 1e6

    def _start_noise(self, request: Request, pictures: int) -> Any:
        shape = (pictures, self.manifest.spec.latent[0], *request.size.cells)
        if request.latents is None:
            return noise_from_seed(shape, request.seed, request.noise)
        if not is_on_gpu(request.latents):
            return checked_latents(request.latents, shape)
        if not self._on_gpu:
            raise InvalidRequest("latents are on a GPU, the pipeline on the CPU; pass a numpy array")
        return request.latents

    def _sample(
        self,
        request: Request,
        chunks: list[RunBatch],
        conditions: Mapping[str, NDArray[Any]],
        noise: Any,
        options: RunOptions,
        sessions: Sessions,
    ) -> tuple[Any, Timings]:
        """The latents of all chunks, and their timings together."""
        latents, timings = [], []
        with sessions("transformer") as session:
            for chunk in chunks:
                trajectory = session.trajectory(Job(request.plan, chunk.rows, request.size.cells, request.guided))
                part, times = trajectory.run(
                    noise if is_on_gpu(noise) else chunk.take(noise),
                    self.manifest.spec.conditioning.rows(chunk.take_all(conditions), guided=request.guided),
                    request.guidance_scale,
                    options,
                )
                whole = options.on_device or chunk.pictures == chunk.rows
                latents.append(part if whole else part[: chunk.pictures].copy())
                timings.append(times)
        return latents[0] if len(latents) == 1 else np.concatenate(latents), Timings.total(timings)

    def _decode(
        self, latents: NDArray[np.float32], size: PictureSize, watch: StepWatch, sessions: Sessions
    ) -> tuple[NDArray[np.uint8] | None, float]:
        """The pictures of latents, and the ms that it took; None if latents are no pixels and there is no decoder."""
        spec = self.manifest.decoder
        if spec is None:
            return (pixels_from_latents(latents) if latents.shape[1] in PIXEL_CHANNELS else None), 0.0
        begin = perf_counter_ns()
        with sessions("decoder") as session:

            def run(tile: NDArray[np.float32]) -> NDArray[np.float32]:
                watch.check()
                return decode_tile(session, spec, tile)

            pixels = Decoder(run, spec).decode(latents, size.requested if size.requested != size.native else None)
        return pixels, (perf_counter_ns() - begin) / 1e6


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0))


def _tokenizer(bundle: Bundle, spec: TextSpec) -> Tokenizer:
    held = bundle.file(TOKENIZER_FILE)
    return Tokenizer(held.path, spec, held.read())


def _capacity(sessions: int, kept: int) -> tuple[int, int]:
    return whole_of("sessions", sessions, most=MOST_SESSIONS), whole_of("kept", kept, most=MOST_KEPT)
