"""Everything that changes what a build makes."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from ilf_trt.contract.guidance import OFF, effective_scale
from ilf_trt.contract.plan import DEFAULT_FEEDBACK, Ratio, Rule
from ilf_trt.contract.ports import DECODE, GRAPHS, TEXT
from ilf_trt.contract.spec import BatchRange, Calibrator, Precision
from ilf_trt.contract.target import EngineOptions
from ilf_trt.errors import InvalidRequest

DEFAULT_BATCH = BatchRange(1, 4, 16)


class PipelinePart(StrEnum):
    """A part of a diffusers pipeline that a bundle can hold with the transformer."""

    TEXT = "text"
    DECODER = "decoder"

    @property
    def graph(self) -> str:
        return TEXT if self is PipelinePart.TEXT else DECODE


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """Everything that changes what a build makes.

    `pipeline` is the folder of a diffusers pipeline: its text encoder and its decoder become graphs too, except those
    in `without`; `text_tokens` None takes its length of a text. `guidance_scale` and `clean_captions` None are what the
    pipeline's class takes by default. `base_differs` takes a base of the same architecture that the feedback block was
    not trained on, such as a fine-tune. `sizes` are (height, width) in pixels, the first is the
    default; `decoder_tile` is the side in pixels above which a picture is decoded in tiles. `engines` None ends at
    ONNX. `cache` is the folder of the build cache; None builds everything again. The cache changes only the time.
    """

    base: str | None = None
    base_differs: bool = False
    precision: Precision = Precision.FP32
    wide_residual: bool = False
    hoist_text: bool = False
    batch: BatchRange = DEFAULT_BATCH
    guidance: bool = True
    guidance_scale: float | None = None
    clean_captions: bool | None = None
    steps: int = 10
    feedback: str = DEFAULT_FEEDBACK
    rule: Rule = Rule.ANNEAL
    ratio: Ratio = Ratio.LOOP_TO_MODEL
    scheduler: str | None = None
    text_tokens: int | None = None
    pipeline: Path | None = None
    without: tuple[PipelinePart, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    text_precision: Precision = Precision.FP32
    decoder_precision: Precision = Precision.FP32
    decoder_tile: int | None = None
    calibration: Path | None = None
    calibrator: Calibrator = Calibrator.AUTO
    fp8_exclude: tuple[str, ...] = ()
    device: str = "cpu"
    verify: bool = True
    max_error: float | None = None
    engines: EngineOptions | None = None
    strip_graphs: bool = False
    cache: Path | None = None

    def check(self) -> None:
        """Raise InvalidRequest for options that contradict one another, before anything is loaded."""
        if self.guidance_scale is not None and effective_scale(self.guidance_scale) > OFF and not self.guidance:
            raise InvalidRequest(
                f"--guidance-scale {self.guidance_scale:g} and --no-guidance contradict one another; leave one out"
            )
        if self.engines is None and self.strip_graphs:
            raise InvalidRequest("--strip-graphs would leave nothing: pass a --target to build engines for")
        if self.precision is not Precision.FP8 and (self.fp8_exclude or self.calibration):
            raise InvalidRequest("--fp8-exclude and --calibration are for --precision fp8")
        if self.text_precision not in (Precision.FP32, Precision.BF16):
            raise InvalidRequest(
                f"--text-precision is {self.text_precision}, T5 takes only fp32 or bf16: it overflows fp16"
            )
        if self.decoder_precision is Precision.FP8:
            raise InvalidRequest("--decoder-precision is fp8, it takes fp32, fp16 or bf16")

    @property
    def part_graphs(self) -> tuple[str, ...]:
        """The graphs of the pipeline's parts, as far as the options tell."""
        return tuple(part.graph for part in PipelinePart if self.pipeline and part not in self.without)

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages of the build, in order."""
        fp8 = ("calibrate",) if self.precision is Precision.FP8 else ()
        return (
            *(("engine library",) if self.engines else ()),
            "load checkpoint",
            *(("reference",) if self.verify else ()),
            *fp8,
            *(f"export {name}" for name in (*GRAPHS, *self.part_graphs)),
            *(("verify",) if self.verify else ()),
            *(f"engine {name}" for name in (*GRAPHS, *self.part_graphs) if self.engines),
        )
