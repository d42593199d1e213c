"""Everything that changes what a build makes."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from ilf_trt.contract.plan import DEFAULT_FEEDBACK, Ratio, Rule
from ilf_trt.contract.ports import DECODE, GRAPHS, TEXT
from ilf_trt.contract.spec import Batch, Calibrator, Precision
from ilf_trt.contract.target import EngineOptions
from ilf_trt.errors import InvalidRequest

DEFAULT_BATCH = Batch(1, 4, 16)


class Stage(StrEnum):
    """What of a diffusers pipeline stands around the transformer."""

    TEXT = "text"
    DECODER = "decoder"

    @property
    def graph(self) -> str:
        return TEXT if self is Stage.TEXT else DECODE


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """Everything that changes what a build makes.

    `pipeline` is a diffusers pipeline folder whose text encoder and decoder become graphs too, but for those in
    `without`; `text_tokens` None takes its length of a text. `sizes` are (height, width) in pixels, the first the
    default; `decoder_tile` is the side in pixels past which a picture is decoded in tiles.
    `engines` None ends at ONNX. `cache` is the folder of the build cache, None builds everything anew; it changes how
    long a build takes and nothing else.
    """

    base: str | None = None
    precision: Precision = Precision.FP32
    wide_residual: bool = False
    hoist_text: bool = False
    batch: Batch = DEFAULT_BATCH
    guidance: bool = True
    guidance_scale: float = 1.5
    steps: int = 10
    feedback: str = DEFAULT_FEEDBACK
    rule: Rule = Rule.ANNEAL
    ratio: Ratio = Ratio.LOOP_TO_MODEL
    scheduler: str | None = None
    text_tokens: int | None = None
    pipeline: Path | None = None
    without: tuple[Stage, ...] = ()
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
        if self.engines is None and self.strip_graphs:
            raise InvalidRequest("--strip-graphs would leave nothing: pass a --target to build engines for")
        if self.precision is not Precision.FP8 and (self.fp8_exclude or self.calibration):
            raise InvalidRequest("--fp8-exclude and --calibration are for --precision fp8")
        if self.text_precision not in (Precision.FP32, Precision.BF16):
            raise InvalidRequest(
                f"--text-precision is {self.text_precision}, T5 takes fp32 or bf16 alone: it overflows"
            )
        if self.decoder_precision is Precision.FP8:
            raise InvalidRequest("--decoder-precision is fp8, it takes fp32, fp16 or bf16")

    @property
    def beside(self) -> tuple[str, ...]:
        """Graphs beside the model's own, as far as the options tell."""
        return tuple(stage.graph for stage in Stage if self.pipeline and stage not in self.without)

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages of the build, in order."""
        fp8 = ("calibrate",) if self.precision is Precision.FP8 else ()
        return (
            *(("engine library",) if self.engines else ()),
            "load checkpoint",
            *(("reference",) if self.verify else ()),
            *fp8,
            *(f"export {name}" for name in (*GRAPHS, *self.beside)),
            *(("verify",) if self.verify else ()),
            *(f"engine {name}" for name in (*GRAPHS, *self.beside) if self.engines),
        )
