"""The flags of `build` about what stands around the transformer: text encoder, decoder, sizes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from ilf_trt.build import Stage
from ilf_trt.contract import Precision
from ilf_trt.errors import InvalidRequest


@Parameter(name="*")
@dataclass(frozen=True)
class PipelineFlags:
    """Flags as they are typed; `options` makes of them what the build takes."""

    pipeline: Annotated[
        Path | None,
        Parameter(
            help="Folder of a diffusers pipeline (DiTPipeline, PixArtAlphaPipeline, PixArtSigmaPipeline): its text "
            "encoder, tokenizer and image decoder go into the bundle. By default the checkpoint's own folder."
        ),
    ] = None
    without: Annotated[
        tuple[Stage, ...],
        Parameter(negative=(), help="Leave text or decoder out: embeddings go in, or latents come out."),
    ] = ()
    size: Annotated[
        str | None,
        Parameter(help="Sizes of pictures in pixels, HEIGHTxWIDTH, the first the default: 512x512,768x512."),
    ] = None
    text_precision: Annotated[
        Precision, Parameter(help="What the text encoder runs in: fp32, or bf16 on a GPU; T5 overflows fp16.")
    ] = Precision.FP32
    decoder_precision: Annotated[
        Precision, Parameter(help="What the image decoder runs in: fp32, fp16, or bf16 on a GPU.")
    ] = Precision.FP32
    decoder_tile: Annotated[
        int | None,
        Parameter(help="Side in pixels of the tiles that larger pictures are decoded in, to save memory."),
    ] = None

    def options(self) -> dict[str, Any]:
        """Under the names of BuildOptions; raises InvalidRequest."""
        return {
            "pipeline": self.pipeline,
            "without": self.without,
            "sizes": () if self.size is None else sizes_of(self.size),
            "text_precision": self.text_precision,
            "decoder_precision": self.decoder_precision,
            "decoder_tile": self.decoder_tile,
        }


def sizes_of(text: str) -> tuple[tuple[int, int], ...]:
    """`"512x512,768x512"` -> ((512, 512), (768, 512)), each (height, width); raises InvalidRequest."""
    return tuple(dict.fromkeys(map(size_of, text.split(","))))


def size_of(text: str) -> tuple[int, int]:
    """`"768x512"` -> (768, 512), (height, width); raises InvalidRequest."""
    sides = text.strip().split("x")
    if len(sides) != 2 or not all(side.isascii() and side.isdecimal() and int(side) > 0 for side in sides):
        raise InvalidRequest(f"size {text!r} is not HEIGHTxWIDTH in pixels; give 512x768")
    return int(sides[0]), int(sides[1])
