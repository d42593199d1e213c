"""From pictures to prepared data: opens the source and the encoders, then writes the shards."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ilf_trt.contract.progress import Progress
from ilf_trt.errors import InvalidRequest

from .images import ImageFolder
from .index import DTYPES, Index
from .prepare import Preparation, check_device, prepare
from .sample import Source
from .text import Text
from .vae import Vae
from .webdataset import TarShards


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareOptions:
    """The options of `ilf-trt prepare`.

    `vae` and `text_encoder` are folders or hub ids. `size` is in pixels, `text_tokens` the length of a caption, `batch`
    in pictures, `shard_size` in samples. `dtype` is that of the stored tensors and of the text encoder. `sample` draws
    latents from the VAE's posterior, by `seed`. `workers` threads read pictures; `max_broken` of them may be broken.
    """

    kind: Literal["images", "webdataset"]
    path: str
    vae: str | None
    text_encoder: str | None
    size: int
    text_tokens: int
    batch: int
    dtype: Literal["fp16", "bf16", "fp32"]
    sample: bool
    shard_size: int
    device: str
    workers: int
    max_broken: int
    seed: int

    def check(self) -> None:
        """Raises InvalidRequest."""
        if self.size < 1 or self.text_tokens < 1 or self.seed < 0:
            raise InvalidRequest(
                f"size is {self.size}, text-tokens {self.text_tokens}, seed {self.seed}; they must be at least 1, 1 "
                "and 0"
            )
        check_device(self.device)

    def preparation(self) -> Preparation:
        """The shards to write, with every setting that decides their content."""
        settings: dict[str, Any] = {
            "kind": self.kind,
            "size": self.size,
            "vae": self.vae,
            "text_encoder": self.text_encoder,
            "sample": self.sample,
            "text_tokens": self.text_tokens if self.text_encoder else None,
            "seed": self.seed if self.sample else None,
        }
        return Preparation(settings, self.dtype, self.shard_size, self.batch, self.max_broken, self.workers)


def prepare_folder(options: PrepareOptions, output: Path, *, progress: Progress) -> Index:
    """Write the latents and texts of a folder or of tar shards into `output`, and return their index.

    Raises InvalidRequest for options, paths or encoders that do not fit, DataError for damaged data or a full disk,
    MissingDependency without transformers.
    """
    options.check()
    source = _open_source(options)
    preparation = options.preparation()
    preparation.check()
    pictures = texts = None
    if options.vae:
        pictures = Vae.load(options.vae, device=options.device, sample=options.sample, seed=options.seed)
    if options.text_encoder:
        dtype = DTYPES[options.dtype]
        texts = Text.load(options.text_encoder, tokens=options.text_tokens, dtype=dtype, device=options.device)
    return prepare(source, output, preparation, pictures=pictures, texts=texts, progress=progress)


def _open_source(options: PrepareOptions) -> Source:
    if options.kind == "images":
        return ImageFolder(options.path, size=options.size)
    return TarShards(options.path, size=options.size)
