"""The command line's flags about engines, which `build` and `compile` share."""

import re
import sys
from dataclasses import dataclass
from math import ceil, isfinite
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter, validators

from ilf_trt.assembly.cache_folder import cache_folder
from ilf_trt.assembly.options import PipelinePart
from ilf_trt.contract.spec import Precision
from ilf_trt.contract.target import GIB, Architecture, EngineOptions, Library
from ilf_trt.errors import InvalidRequest, shown

from .numbers import OptionalReal, OptionalWhole, real_number

RatioName = Literal["m/n", "n/m"]
SIZE = re.compile(r"([1-9][0-9]{0,6})x([1-9][0-9]{0,6})")
SIZE_CHARS = 60

CacheFolder = Annotated[
    Path | None,
    Parameter(
        name="--cache-dir",
        env_var="ILF_TRT_CACHE",
        help="Folder of the build cache; by default the user's cache folder.",
    ),
]


MaxError = Annotated[float | None, Parameter(converter=real_number, validator=validators.Number(gte=0))]
MaxMemory = Annotated[float | None, Parameter(converter=real_number, validator=validators.Number(gt=0))]


@Parameter(name="*")
@dataclass(frozen=True)
class EngineFlags:
    """Flags as they are typed; `options` makes of them what the builder takes."""

    target: Annotated[
        Library | None, Parameter(help="Engine library: tensorrt for the GPU at hand, tensorrt-rtx for those of --gpu.")
    ] = None
    gpu: Annotated[str | None, Parameter(help="Architectures that tensorrt-rtx builds for: sm89,sm120.")] = None
    builder_level: Annotated[
        OptionalWhole,
        Parameter(help="How long the builder may search for faster kernels, 0 to 5; by default the library's."),
    ] = None
    workspace: Annotated[
        OptionalReal, Parameter(help="Most GPU memory that a kernel may work in, GiB; by default all of it.")
    ] = None
    hardware_compat: Annotated[
        bool, Parameter(negative=(), help="Let other cards of the same architecture run the engines (H100 and H200).")
    ] = False
    timing_cache: Annotated[bool, Parameter(help="Keep what TensorRT timed on this GPU for the next build.")] = True
    strip_graphs: Annotated[
        bool, Parameter(negative=(), help="Leave the ONNX graphs out of the bundle; the CPU can then no longer run it.")
    ] = False
    cache: Annotated[bool, Parameter(help="Take graphs and engines that were made before from the build cache.")] = True
    cache_dir: CacheFolder = None

    def options(self) -> EngineOptions | None:
        """None without a target; raises InvalidRequest."""
        if self.target is None:
            for flag, given in (
                ("--gpu", self.gpu),
                ("--builder-level", self.builder_level),
                ("--workspace", self.workspace),
            ):
                if given is not None:
                    raise InvalidRequest(
                        f"{flag} is about engines: pass --target tensorrt or --target tensorrt-rtx too"
                    )
            if self.hardware_compat:
                raise InvalidRequest("--hardware-compat is about engines: pass --target tensorrt too")
            return None
        if self.workspace is not None and not isfinite(self.workspace):
            raise InvalidRequest(f"--workspace is {self.workspace} GiB, it must be finite")
        options = EngineOptions(
            library=self.target,
            gpus=tuple(Architecture.parse(part) for part in self.gpu.split(",")) if self.gpu else (),
            builder_level=self.builder_level,
            workspace_bytes=None if self.workspace is None else int(self.workspace * GIB),
            any_gpu_of_architecture=self.hardware_compat,
            timing_cache=self.timing_cache,
        )
        options.check()
        return options

    def cache_folder(self) -> Path | None:
        """None with --no-cache."""
        return cache_folder(self.cache_dir) if self.cache else None


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
        tuple[PipelinePart, ...],
        Parameter(negative=(), help="Leave text or decoder out: embeddings go in, or latents come out."),
    ] = ()
    size: Annotated[
        str | None,
        Parameter(help="Sizes of pictures in pixels, HEIGHTxWIDTH, the first the default: 512x512,768x512."),
    ] = None
    text_precision: Annotated[
        Precision | None,
        Parameter(
            help="What the text encoder runs in: fp32, or bf16 on a GPU; T5 overflows fp16. By default bf16 with "
            "--target, but fp32 if a GPU is older than sm80; fp32 without --target."
        ),
    ] = None
    decoder_precision: Annotated[
        Precision | None,
        Parameter(
            help="What the image decoder runs in: fp32, fp16, or bf16 on a GPU. By default fp16 with --target, fp32 "
            "without."
        ),
    ] = None
    decoder_tile: Annotated[
        OptionalWhole,
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


def bytes_of(gib: float) -> int:
    """GiB above 0 -> bytes, rounded up, at most what an address reaches."""
    return ceil(min(gib * GIB, sys.maxsize))


def sizes_of(text: str) -> tuple[tuple[int, int], ...]:
    """`"512x512,768x512"` -> ((512, 512), (768, 512)), each (height, width); raises InvalidRequest."""
    return tuple(dict.fromkeys(map(size_of, text.split(","))))


def size_of(text: str) -> tuple[int, int]:
    """`"768x512"` -> (768, 512), (height, width); raises InvalidRequest."""
    sides = SIZE.fullmatch(text.strip())
    if sides is None:
        raise InvalidRequest(f"size {shown(text, SIZE_CHARS)!r} is not HEIGHTxWIDTH in pixels; give 512x768")
    return int(sides[1]), int(sides[2])
