"""The manifest: everything that a bundle says of itself, checked before anything else of it is read."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ilf_trt.errors import BundleError, IlfError, InvalidRequest, one_line, shown, told

from .document import Count, DocumentError, Size, as_type
from .graphs import all_graphs
from .plan import LARGEST, StepPlan
from .ports import DECODE, PICTURES, TEXT, Graph
from .spec import BatchRange, Calibrator, DecoderSpec, ModelSpec, Precision, TextSpec
from .stamp import DIGEST, check_stamp, stamped

SCHEMA = 5
SHA256 = re.compile("[0-9a-f]{64}")
MOST_SIZES = 1000
MOST_FILES = 4096
MOST_TILES = 64
ATTENTION_PRODUCTS = ("scores", "mixed")
"""What the nodes of an attention's two products are called after it: of query and key, and with the value."""
RATIO = re.compile(r"[0-9]{1,6}(?:\.[0-9]{1,12})?")


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What a file of the bundle must be."""

    sha256: str
    size_bytes: int

    def __post_init__(self) -> None:
        if not SHA256.fullmatch(self.sha256) or not 0 <= self.size_bytes < 1 << 50:
            raise InvalidRequest(f"a file of {self.size_bytes} bytes with sha256 {shown(self.sha256, 70)}")


@dataclass(frozen=True, slots=True)
class AttentionAmax:
    """The largest magnitudes that enter an attention: the query times the attention's scale, the key, the value."""

    query: float
    key: float
    value: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """What FP8's scales come from: the largest |input| of each Linear that runs in FP8, by its name in the model.

    `attentions` are those that run in FP8, by the path of their query's Linear without its last part,
    `transformer_blocks.8.attn1`; none in a bundle with attention in FP16. `calibrator` measured all of it while
    `pictures` were sampled.
    """

    calibrator: Calibrator
    pictures: Count
    amax: dict[str, float]
    attentions: dict[str, AttentionAmax] = field(default_factory=dict)

    @property
    def products(self) -> tuple[str, ...]:
        """The names of all matrix products in FP8: of the Linears, and two of each attention."""
        return (*self.amax, *(f"{name}.{part}" for name in self.attentions for part in ATTENTION_PRODUCTS))


@dataclass(frozen=True, slots=True)
class PictureFacts:
    """What a picture is to people: `cell` pixels to a side of a latent's cell, classes by `names`.

    `bins` are the sizes (height, width) in pixels that the model was trained on, by their ratio; a request is brought
    to the nearest of them if there are any.
    """

    cell: Size
    names: dict[str, Count]
    bins: dict[str, tuple[Size, Size]]


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
        """Plain data with a digest of itself; `Manifest.from_json` reads it back."""
        return stamped({"schema": SCHEMA, **asdict(self), "plan": self.plan.as_json()})

    @property
    def digest(self) -> str:
        """sha256 of everything that the manifest says, in hex, as it stands in its file: what names a bundle."""
        return str(self.as_json()[DIGEST])

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Manifest":
        """Raises BundleError for another schema, another digest, or a field that is missing, unknown or wrong."""
        schema = data.get("schema")
        if schema != SCHEMA:
            newer = isinstance(schema, int) and schema > SCHEMA
            hint = "upgrade ilf-trt" if newer else "build the bundle again"
            raise BundleError(f"manifest schema is {told(schema, 40)}, this version reads {SCHEMA}; {hint}")
        try:
            content = check_stamp(data)
        except DocumentError as error:
            raise BundleError(f"the manifest {error.reason}; copy the bundle again, or build it again") from error
        try:
            plan = StepPlan.from_json(content.get("plan", {}))
            fields = {name: value for name, value in content.items() if name != "schema"}
            manifest = as_type({**fields, "plan": asdict(plan)}, cls)
            manifest.check()
        except (IlfError, TypeError, ValueError, AttributeError) as error:
            raise BundleError(f"manifest: {one_line(error)}; build the bundle again") from error
        return manifest

    def precision_of(self, graph: str) -> Precision:
        """What a graph runs in: text encoder and decoder have a precision of their own."""
        part = {TEXT: self.text, DECODE: self.decoder}.get(graph)
        return self.precision if part is None else part.precision

    def check(self) -> None:
        """Raise InvalidRequest when parts of the manifest contradict one another, or ask for what no model has."""
        spec, plan = self.spec, self.plan
        if spec.latent[1:] not in spec.sizes or not len(spec.sizes) <= MOST_SIZES:
            raise InvalidRequest(f"the default size {spec.latent[1:]} is not among {len(spec.sizes)} sizes")
        if any(side % spec.patch for size in spec.sizes for side in size):
            raise InvalidRequest(f"a size is not in steps of the patch, {spec.patch}")
        for port in spec.conditions:
            first, *others = port.shape or (0,)
            if first != PICTURES or not all(isinstance(dim, int) for dim in others):
                raise InvalidRequest(f"condition {shown(port.name, 60)!r} is not a row for each picture")
        spec.loop.check(spec.blocks)
        BatchRange.parse(f"{self.batch.min}:{self.batch.opt}:{self.batch.max}")
        if self.graphs != all_graphs(spec, self.precision, self.text, self.decoder):
            raise InvalidRequest("the graphs' ports are not those of the model")
        if (plan.blocks, plan.loop) != (spec.blocks, spec.loop):
            raise InvalidRequest("the plan is for another model or loop")
        if len(plan.steps) > spec.train_timesteps:
            raise InvalidRequest(f"the plan has {len(plan.steps)} steps, the model has {spec.train_timesteps} times")
        if len(self.scales) != spec.loop.size:
            raise InvalidRequest(f"{len(self.scales)} scales for {spec.loop.size} loop blocks")
        if not all(abs(number) <= LARGEST for number in (*self.scales, self.guidance_scale)):
            raise InvalidRequest("a scale is not finite, or too large for float32")
        if not SHA256.fullmatch(self.base_sha256):
            raise InvalidRequest("base_sha256 is no sha256")
        self._check_engines()
        self._check_fp8()
        self._check_picture()

    def _check_engines(self) -> None:
        if len(self.files) > MOST_FILES:
            raise InvalidRequest(f"{len(self.files)} files, at most {MOST_FILES} are read")
        names = {graph.name for graph in self.graphs}
        for facts in self.engines:
            if facts.graph not in names or not {facts.file, facts.report} <= self.files.keys():
                raise InvalidRequest(f"an engine of graph {shown(facts.graph, 40)!r} is not among the files")

    def _check_fp8(self) -> None:
        if (self.fp8 is not None) != (self.precision is Precision.FP8):
            raise InvalidRequest("the FP8 facts do not go with the precision")
        if self.fp8 is None:
            return
        ranges = (
            (f"{name}.{part}", value)
            for name, each in self.fp8.attentions.items()
            for part, value in asdict(each).items()
        )
        for name, value in (*self.fp8.amax.items(), *ranges):
            self.spec.graph_of_linear(name)
            if not 0 <= value <= LARGEST:
                raise InvalidRequest(
                    f"the FP8 scale of {shown(name, 60)!r} is {value}, it must be finite and not negative"
                )

    def _check_picture(self) -> None:
        spec, picture, decoder = self.spec, self.picture, self.decoder
        classes = spec.conditioning.classes
        if any(label >= (classes or 0) for label in picture.names.values()):
            raise InvalidRequest("a class has a name and is none of the model's")
        if len(picture.bins) > MOST_SIZES or not all(RATIO.fullmatch(ratio) for ratio in picture.bins):
            raise InvalidRequest("the ratios of the trained sizes are no numbers")
        if decoder is None:
            return
        if (decoder.channels, decoder.scale) != (spec.latent[0], picture.cell):
            raise InvalidRequest("the decoder is for other latents")
        if decoder.tile and any(side > MOST_TILES * decoder.tile for size in spec.sizes for side in size):
            raise InvalidRequest(f"tiles of {decoder.tile} cells, more than {MOST_TILES} of them to a side")
