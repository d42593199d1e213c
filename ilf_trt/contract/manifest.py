"""The manifest: everything that a bundle says of itself, checked before anything else of it is read."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from ilf_trt.errors import BundleError, InvalidRequest

from .conditioning import Conditioning
from .graphs import all_graphs
from .plan import StepPlan
from .ports import DECODE, TEXT, Graph, Port, Role
from .spec import (
    BatchRange,
    Calibrator,
    DecoderSpec,
    Loop,
    ModelSpec,
    Positions,
    Precision,
    Stream,
    TextSpec,
)

SCHEMA = 4


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What a file of the bundle must be."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Calibration:
    """What FP8's scales come from: the largest |input| of each Linear that runs in FP8, by its name in the model.

    `calibrator` measured it while `pictures` were sampled.
    """

    calibrator: Calibrator
    pictures: int
    amax: dict[str, float]


@dataclass(frozen=True, slots=True)
class PictureFacts:
    """What a picture is to people: `cell` pixels to a side of a latent's cell, classes by `names`.

    `bins` are the sizes (height, width) in pixels that the model was trained on, by their ratio; a request is brought
    to the nearest of them if there are any.
    """

    cell: int
    names: dict[str, int]
    bins: dict[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """One graph's engine: where it lies, what built it, and what it runs on.

    `gpus` are architectures (`sm90`); `gpu_name` and `driver` are those of the machine that built it, empty where it
    was built ahead of time. `any_gpu_of_architecture` lets other cards of the same architecture run it. `key` names its
    content in the build cache.
    """

    graph: str
    target: str
    file: str
    report: str
    library_version: str
    gpus: tuple[str, ...]
    gpu_name: str
    driver: str
    any_gpu_of_architecture: bool
    key: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything the runtime needs to know before it opens a graph; `scales` (m,) are the learned feedback scales.

    `text` and `decoder` are None where a bundle takes embedded text, or gives latents. `guidance_scale` and
    `clean_captions` are what a request takes that names neither. `base_sha256` is the fingerprint of the base in the
    graphs, `base_rounded_sha256` those of its weights rounded to float16 and to bfloat16; `base_differs` says that the
    feedback block was trained on another base.
    """

    spec: ModelSpec
    precision: Precision
    batch: BatchRange
    graphs: tuple[Graph, ...]
    scales: tuple[float, ...]
    plan: StepPlan
    scheduler: dict[str, Any]
    guidance_scale: float
    clean_captions: bool
    base_sha256: str
    base_rounded_sha256: dict[str, str]
    base_differs: bool
    tools: dict[str, str]
    fp8: Calibration | None
    text: TextSpec | None
    decoder: DecoderSpec | None
    picture: PictureFacts
    engines: tuple[EngineFacts, ...]
    files: dict[str, FileFacts]

    def as_json(self) -> dict[str, Any]:
        """Plain data; `Manifest.from_json` reads it back."""
        return {"schema": SCHEMA, **asdict(self), "plan": self.plan.as_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Manifest":
        """Raises BundleError for a newer schema or a field that is missing or wrong."""
        schema = data.get("schema")
        if schema != SCHEMA:
            newer = isinstance(schema, int) and schema > SCHEMA
            hint = "upgrade ilf-trt" if newer else "build the bundle again"
            raise BundleError(f"manifest schema is {schema!r}, this version reads {SCHEMA}; {hint}")
        try:
            spec = data["spec"]
            manifest = cls(
                spec=ModelSpec(
                    **{
                        **spec,
                        "latent": tuple(spec["latent"]),
                        "sizes": tuple((int(height), int(width)) for height, width in spec["sizes"]),
                        "positions": Positions(**spec["positions"]),
                        "side_streams": tuple(_stream(stream) for stream in spec["side_streams"]),
                        "loop": Loop(**spec["loop"]),
                        "conditioning": _conditioning(spec["conditioning"]),
                        **{name: _ports(spec[name]) for name in ("context", "per_block", "constants")},
                    }
                ),
                precision=Precision(data["precision"]),
                batch=BatchRange(**data["batch"]),
                graphs=tuple(
                    Graph(graph["name"], _ports(graph["inputs"]), _ports(graph["outputs"])) for graph in data["graphs"]
                ),
                scales=tuple(float(value) for value in data["scales"]),
                plan=StepPlan.from_json(data["plan"]),
                scheduler=dict(data["scheduler"]),
                guidance_scale=float(data["guidance_scale"]),
                clean_captions=_flag(data["clean_captions"]),
                base_sha256=str(data["base_sha256"]),
                base_rounded_sha256=dict(data["base_rounded_sha256"]),
                base_differs=_flag(data["base_differs"]),
                tools=dict(data["tools"]),
                fp8=None if data["fp8"] is None else _calibration(data["fp8"]),
                text=None if data["text"] is None else _text(data["text"]),
                decoder=None if data["decoder"] is None else _decoder(data["decoder"]),
                picture=_picture(data["picture"]),
                engines=tuple(EngineFacts(**{**facts, "gpus": tuple(facts["gpus"])}) for facts in data["engines"]),
                files={
                    str(name): FileFacts(str(facts["sha256"]), int(facts["size_bytes"]))
                    for name, facts in data["files"].items()
                },
            )
            manifest.check()
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise BundleError(f"manifest field missing or wrong ({error!r}); build the bundle again") from error
        return manifest

    def precision_of(self, graph: str) -> Precision:
        """What a graph runs in: text encoder and decoder have a precision of their own."""
        part = {TEXT: self.text, DECODE: self.decoder}.get(graph)
        return self.precision if part is None else part.precision

    def check(self) -> None:
        """Raise InvalidRequest when parts of the manifest contradict one another."""
        spec, plan = self.spec, self.plan
        sides = (side for size in spec.sizes for side in size)
        sizes = (spec.blocks, spec.width, *spec.latent, *sides, spec.train_timesteps, *asdict(spec.loop).values())
        if not all(isinstance(size, int) for size in sizes):
            raise InvalidRequest("the model's dimensions are not whole numbers")
        if spec.latent[1:] not in spec.sizes:
            raise InvalidRequest(f"the default size {spec.latent[1:]} is not among {spec.sizes}")
        spec.loop.check(spec.blocks)
        if not all(isinstance(n, int) for n in asdict(self.batch).values()):
            raise InvalidRequest("the batch is not in whole numbers")
        BatchRange.parse(f"{self.batch.min}:{self.batch.opt}:{self.batch.max}")
        if self.graphs != all_graphs(spec, self.precision, self.text, self.decoder):
            raise InvalidRequest("the graphs' ports are not those of the model")
        if (plan.blocks, plan.loop) != (spec.blocks, spec.loop):
            raise InvalidRequest("the plan is for another model or loop")
        names = {graph.name for graph in self.graphs}
        for facts in self.engines:
            if facts.graph not in names or not {facts.file, facts.report} <= self.files.keys():
                raise InvalidRequest(f"an engine of graph {facts.graph!r} is not among the files")
        if (self.fp8 is not None) != (self.precision is Precision.FP8):
            raise InvalidRequest("the FP8 facts do not go with the precision")
        for name, value in (self.fp8.amax if self.fp8 else {}).items():
            spec.graph_of_linear(name)
            if not (isfinite(value) and value >= 0):
                raise InvalidRequest(f"the FP8 scale of {name!r} is {value}, it must be finite and not negative")
        if len(self.scales) != spec.loop.size or not all(map(isfinite, (*self.scales, self.guidance_scale))):
            raise InvalidRequest(f"{len(self.scales)} scales for {spec.loop.size} loop blocks, or one is not finite")


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} is neither true nor false")
    return value


def _text(data: Mapping[str, Any]) -> TextSpec:
    return TextSpec(**{**data, "precision": Precision(data["precision"])})


def _decoder(data: Mapping[str, Any]) -> DecoderSpec:
    height, width = data["size"]
    return DecoderSpec(**{**data, "size": (height, width), "precision": Precision(data["precision"])})


def _picture(data: Mapping[str, Any]) -> PictureFacts:
    bins = {str(ratio): (int(height), int(width)) for ratio, (height, width) in data["bins"].items()}
    return PictureFacts(int(data["cell"]), {str(name): int(label) for name, label in data["names"].items()}, bins)


def _calibration(data: Mapping[str, Any]) -> Calibration:
    amax = {str(name): float(value) for name, value in data["amax"].items()}
    return Calibration(Calibrator(data["calibrator"]), int(data["pictures"]), amax)


def _ports(data: list[dict[str, Any]]) -> tuple[Port, ...]:
    return tuple(Port(**{**port, "shape": tuple(port["shape"]), "role": Role(port["role"])}) for port in data)


def _stream(data: Mapping[str, Any]) -> Stream:
    return Stream(str(data["name"]), tuple(data["tokens"]), int(data["width"]))


def _conditioning(data: Mapping[str, Any]) -> Conditioning:
    return Conditioning(_ports(data["positive"]), None if data["null"] is None else int(data["null"]))
