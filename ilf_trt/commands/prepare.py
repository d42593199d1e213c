"""The command `prepare`: pictures to latents and embedded text that `train` reads."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ilf_trt.errors import InvalidRequest, MissingDependency

if TYPE_CHECKING:
    from ilf_trt.train.data.sample import Source


def prepare(
    *,
    data_kind: Literal["images", "webdataset"],
    path: str,
    output: Annotated[Path, Parameter(alias="-o")],
    vae: str | None = None,
    text_encoder: str | None = None,
    size: int = 256,
    text_tokens: int = 120,
    batch: int = 8,
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16",
    sample: Annotated[bool, Parameter(negative=())] = False,
    shard_size: int = 1000,
    device: str = "cpu",
    workers: int = 2,
    max_broken: int = 100,
    seed: int = 0,
) -> None:
    """Make latents and embedded text from pictures; the same command goes on where it was stopped.

    Example: `ilf-trt prepare --data-kind images --path photos --vae stabilityai/sd-vae-ft-ema -o build/latents`

    Parameters
    ----------
    data_kind
        images: a folder with a subfolder for every class, or with metadata.jsonl; webdataset: tar shards.
    path
        The folder; for webdataset also a shard, a glob, or braces such as shard-{000..009}.tar.
    output
        Folder for the shards and their index.
    vae
        A diffusers folder or hub id of an AutoencoderKL; without it, pixels stay pixels.
    text_encoder
        A folder or hub id of a T5 and its tokenizer; captions need one.
    size
        Pictures are cropped to their centre and resized to this many pixels.
    text_tokens
        Tokens of a caption: 120 for PixArt-alpha, 300 for PixArt-Sigma.
    batch
        Pictures that are encoded at once.
    dtype
        What latents and text are stored in, and the text encoder runs in; the VAE runs in fp32.
    sample
        Draw each latent from the VAE's posterior, by the seed, in place of its mean.
    shard_size
        Samples of a shard.
    device
        Where to encode, such as cuda:0.
    workers
        Threads that read pictures.
    max_broken
        Broken pictures that are skipped before it stops.
    seed
        Of --sample.
    """
    if size < 1 or text_tokens < 1 or seed < 0:
        raise InvalidRequest(
            f"size is {size}, text-tokens {text_tokens}, seed {seed}; they must be at least 1, 1 and 0"
        )
    try:
        from ilf_trt.train.data.index import DTYPES
        from ilf_trt.train.data.prepare import Preparation, check_device
        from ilf_trt.train.data.prepare import prepare as write
        from ilf_trt.train.data.text import Text
        from ilf_trt.train.data.vae import Vae
    except ImportError as error:
        raise MissingDependency(f"preparing data needs {error.name}; pip install 'ilf-trt[prepare]'") from error
    check_device(device)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    source = _source(data_kind, path, size)
    settings = {"kind": data_kind, "size": size, "vae": vae, "text_encoder": text_encoder, "sample": sample}
    settings |= {"text_tokens": text_tokens if text_encoder else None, "seed": seed if sample else None}
    how = Preparation(settings, dtype, shard_size, batch, max_broken, workers)
    how.check()
    pictures = Vae.load(vae, device=device, sample=sample, seed=seed) if vae else None
    texts = Text.load(text_encoder, tokens=text_tokens, dtype=DTYPES[dtype], device=device) if text_encoder else None
    with _bar() as progress:
        index = write(source, output, how, pictures=pictures, texts=texts, progress=progress)
    rows = sum(shard.rows for shard in index.shards)
    Console(soft_wrap=True).print(
        f"wrote {output}: {rows} samples of {'x'.join(map(str, index.shape))} with {index.condition}, "
        f"{len(index.broken)} broken\nnext: ilf-trt train --config … --set data.kind=latents --set data.path={output}",
        highlight=False,
        markup=False,
    )


def _source(kind: str, path: str, size: int) -> "Source":
    from ilf_trt.train.data.images import ImageFolder
    from ilf_trt.train.data.webdataset import TarShards

    opened: Any = ImageFolder if kind == "images" else TarShards
    source: Source = opened(path, size=size)
    return source


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    with Progress(
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task("prepare", total=None, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)
