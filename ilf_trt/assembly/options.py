"""Everything that changes what a build makes."""

from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from ilf_trt.contract.guidance import OFF, effective_scale
from ilf_trt.contract.plan import DEFAULT_FEEDBACK, Ratio, Rule
from ilf_trt.contract.ports import DECODE, GRAPHS, TEXT
from ilf_trt.contract.spec import BatchRange, Calibrator, Precision
from ilf_trt.contract.target import BF16_FROM, Architecture, EngineOptions, Library
from ilf_trt.errors import InvalidRequest

DEFAULT_BATCH = BatchRange(1, 4, 16)
FUSED_TOKENS = 64  # TensorRT-RTX 1.7.1 fuses FP8 attention over 64 tokens, and not over 16; measured on sm89 and sm120


class PipelinePart(StrEnum):
    """A part of a diffusers pipeline that a bundle can hold with the transformer."""

    TEXT = "text"
    DECODER = "decoder"

    @property
    def graph(self) -> str:
        return TEXT if self is PipelinePart.TEXT else DECODE

    @property
    def option(self) -> str:
        """The option that names its precision."""
        return f"--{self}-precision"

    def check(self, precision: Precision, gpus: tuple[Architecture, ...]) -> None:
        """Raise InvalidRequest when one of `gpus` cannot run the part in `precision`."""
        for gpu in gpus:
            if precision is Precision.BF16 and gpu.number < BF16_FROM:
                raise InvalidRequest(
                    f"{gpu} has no bf16 units for the {self} part, they begin with sm{BF16_FROM}; build with "
                    f"{self.option} {'fp32' if self is PipelinePart.TEXT else 'fp16'}"
                )


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """Everything that changes what a build makes.

    `pipeline` is the folder of a diffusers pipeline: its text encoder and its decoder become graphs too, except those
    in `without`; `text_tokens` None takes its length of a text. `guidance_scale` and `clean_captions` None are what the
    pipeline's class takes by default. `base_differs` takes a base of the same architecture that the feedback block was
    not trained on, such as a fine-tune. `sizes` are (height, width) in pixels, the first is the default; `decoder_tile`
    is the side in pixels above which a picture is decoded in tiles. `text_precision` and `decoder_precision` None are
    what the target takes, see `precision_of`. `engines` None ends at ONNX. `cache` is the folder of the build cache;
    None builds everything again. The cache changes only the time.
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
    text_precision: Precision | None = None
    decoder_precision: Precision | None = None
    decoder_tile: int | None = None
    calibration: Path | None = None
    calibrator: Calibrator = Calibrator.AUTO
    fp8_exclude: tuple[str, ...] = ()
    fp8_attention: bool | None = None
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
        if self.precision is not Precision.FP8 and self.fp8_attention:
            raise InvalidRequest("--fp8-attention is for --precision fp8; leave it out")
        if self.text_precision not in (None, Precision.FP32, Precision.BF16):
            raise InvalidRequest(
                f"--text-precision is {self.text_precision}, T5 takes only fp32 or bf16: it overflows fp16"
            )
        if self.decoder_precision is Precision.FP8:
            raise InvalidRequest("--decoder-precision is fp8, it takes fp32, fp16 or bf16")

    def is_default(self, part: PipelinePart) -> bool:
        """Whether nobody named the part's precision."""
        return self._given(part) is None

    def precision_of(self, part: PipelinePart, gpus: tuple[Architecture, ...] = ()) -> Precision:
        """What a part runs in: the given precision; by default FP32 without engines, else what a GPU is fast in.

        That is FP16 for the decoder, and BF16 for the text encoder, or FP32 if a GPU is older than BF16. `gpus` are
        those that the engines run on, when the options do not name them: TensorRT's.
        """
        given = self._given(part)
        if given is not None or self.engines is None:
            return given or Precision.FP32
        if part is PipelinePart.DECODER:
            return Precision.FP16
        old = any(gpu.number < BF16_FROM for gpu in gpus or self.engines.gpus)
        return Precision.FP32 if old else Precision.BF16

    def settled(self, gpus: tuple[Architecture, ...] = ()) -> "BuildOptions":
        """The same options with a precision for each part; raises InvalidRequest when one of `gpus` cannot run it."""
        precisions = {part: self.precision_of(part, gpus) for part in PipelinePart}
        for part, precision in precisions.items():
            part.check(precision, gpus)
        self._check_text(precisions[PipelinePart.TEXT], gpus)
        return replace(
            self,
            text_precision=precisions[PipelinePart.TEXT],
            decoder_precision=precisions[PipelinePart.DECODER],
        )

    def _check_text(self, precision: Precision, gpus: tuple[Architecture, ...]) -> None:
        """Raise InvalidRequest for a text encoder in FP32 and a GPU for which TensorRT-RTX has no FP32 products."""
        engines = self.engines
        if PipelinePart.TEXT.graph not in self.part_graphs or engines is None or precision is not Precision.FP32:
            return
        old = [gpu for gpu in gpus or engines.gpus if gpu.number < BF16_FROM]
        if engines.library is Library.TENSORRT_RTX and old:
            raise InvalidRequest(
                f"{engines.library} has no FP32 products for {old[0]}, and T5 overflows fp16; pass --without text, or "
                "leave that GPU out of --gpu"
            )

    def _given(self, part: PipelinePart) -> Precision | None:
        return self.text_precision if part is PipelinePart.TEXT else self.decoder_precision

    def has_fp8_attention(self, tokens: int) -> bool:
        """Whether attentions over `tokens` image tokens run in FP8; by default from 64 tokens on, in an FP8 bundle.

        TensorRT-RTX does not fuse FP8 attention over fewer tokens: it then costs kernels.
        """
        if self.fp8_attention is None:
            return self.precision is Precision.FP8 and tokens >= FUSED_TOKENS
        return self.fp8_attention

    @property
    def pads_heads(self) -> bool:
        """Whether heads of FP8 attention are filled up with zeros to a multiple of 16 values.

        TensorRT fuses FP8 attention for such heads alone. TensorRT-RTX fuses others too, and would read more zeros.
        """
        return self.engines is None or self.engines.library is not Library.TENSORRT_RTX

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
