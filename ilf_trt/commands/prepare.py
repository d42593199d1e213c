"""The command `prepare`: turns pictures into latents and embedded text that `train` reads."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from ilf_trt.leaves import prepare_data

from .log import log_to_terminal
from .numbers import Whole
from .progress_bar import progress_bar
from .terminal import say


def prepare(
    *,
    data_kind: Literal["images", "webdataset"],
    path: str,
    output: Annotated[Path, Parameter(alias="-o")],
    vae: str | None = None,
    text_encoder: str | None = None,
    size: Whole = 256,
    text_tokens: Whole = 120,
    batch: Whole = 8,
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16",
    sample: Annotated[bool, Parameter(negative=())] = False,
    shard_size: Whole = 1000,
    device: str = "cpu",
    workers: Whole = 2,
    max_broken: Whole = 100,
    seed: Whole = 0,
) -> None:
    """Make latents and embedded text from pictures; run the same command again to resume.

    Example: `ilf-trt prepare --data-kind images --path photos --vae stabilityai/sd-vae-ft-ema -o build/latents`

    Parameters
    ----------
    data_kind
        images: a folder with a subfolder for every class, or with metadata.jsonl; webdataset: tar shards.
    path
        The folder; for webdataset also a shard, a glob, or braces such as shard-{000..009}.tar.
    output
        Folder of the shards and their index.
    vae
        A diffusers folder or hub id of an AutoencoderKL; without a VAE, pixels stay pixels.
    text_encoder
        A folder or hub id of a T5 and its tokenizer; captions need them.
    size
        Side of the pictures in pixels; each is cropped to its centre square and resized.
    text_tokens
        Tokens of a caption: 120 for PixArt-alpha, 300 for PixArt-Sigma.
    batch
        Pictures that the encoders take at once.
    dtype
        The dtype of the stored latents and text, and of the text encoder; the VAE runs in fp32.
    sample
        Draw each latent from the VAE's posterior, by the seed, instead of its mean.
    shard_size
        Samples in a shard.
    device
        Device of the encoders, such as cuda:0.
    workers
        Threads that read pictures.
    max_broken
        The most broken pictures to skip; the command stops at one more.
    seed
        Seed of --sample.
    """
    log_to_terminal()
    with progress_bar() as progress:
        index = prepare_data(
            output,
            kind=data_kind,
            path=path,
            vae=vae,
            text_encoder=text_encoder,
            size=size,
            text_tokens=text_tokens,
            batch=batch,
            dtype=dtype,
            sample=sample,
            shard_size=shard_size,
            device=device,
            workers=workers,
            max_broken=max_broken,
            seed=seed,
            progress=progress,
        )
    rows = sum(shard.rows for shard in index.shards)
    say(
        f"wrote {output}: {rows} samples of {'x'.join(map(str, index.shape))} with {index.condition}, "
        f"{len(index.broken)} broken",
        f"next: ilf-trt train --config … --set data.kind=latents --set data.path={output}",
    )
