"""Small pipelines with random weights, made and saved by diffusers itself."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

from tests.small_tokenizer import unigram

CHANNELS, TEXT_WIDTH, CLASSES = 4, 32, 1000
NAMES = {
    "0": "tench, Tinca tinca",
    "1": "goldfish",
    "2": "red fox, Vulpes vulpes",
    "3": "teapot",
    "4": "crane",
    "5": "ox",
}
SENTENCES = (
    "a red fox jumps over the lazy dog",
    "an astronaut riding a horse, photorealistic, 8k",
    "ein grüner Baum steht am Fluß; señor, l'été",
    "blurry, low quality, ugly",
    "cat face with tears of joy",
)
SPREAD = 0.2  # of the random weights: large enough that every condition shows in the picture


def tokenizer(folder: Path) -> Any:
    """A small Unigram tokenizer with T5's conventions, as transformers has it."""
    folder.mkdir(parents=True, exist_ok=True)
    unigram(SENTENCES).save(str(folder / "tokenizer.json"))
    return T5TokenizerFast.from_pretrained(folder, extra_ids=0)


def text_encoder(vocabulary: int, **changes: Any) -> T5EncoderModel:
    config = {
        "vocab_size": vocabulary,
        "d_model": TEXT_WIDTH,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
        "feed_forward_proj": "gated-gelu",
    }
    return spread(T5EncoderModel(T5Config(**config | changes)))


def vae(levels: int = 2) -> AutoencoderKL:
    """A cell is 2 pixels wide with two levels, 8 with four."""
    return spread(
        AutoencoderKL(
            block_out_channels=(8, 16, 16, 16)[:levels],
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            norm_num_groups=4,
            latent_channels=CHANNELS,
            sample_size=16,
            scaling_factor=0.5,
        ),
        SPREAD / 2,
    )


def dit_pipeline(folder: Path) -> DiTPipeline:
    """Saved in `folder`, and loaded from there."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS,
        num_layers=4,
        sample_size=8,
        num_embeds_ada_norm=CLASSES,
        norm_type="ada_norm_zero",
    )
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipeline = DiTPipeline(spread(transformer), vae(), scheduler, id2label=NAMES)
    pipeline.save_pretrained(folder)
    index = json.loads(
        (folder / "model_index.json").read_text()
    )  # diffusers reads names, as the hub has them, and saves none
    (folder / "model_index.json").write_text(json.dumps(index | {"id2label": NAMES}))
    return DiTPipeline.from_pretrained(folder)


def pixart_pipeline(folder: Path, *, sigma: bool = False, sized: bool = False, levels: int = 2) -> Any:
    """PixArt-alpha or Sigma, saved in `folder` and loaded from there.

    `sized` is one of 1024 pixels, as diffusers gives micro-conditions to those alone; with 4 `levels` of its VAE a cell
    is 8 pixels wide.
    """
    torch.manual_seed(0)  # pipelines of one shape have the same weights, so a build cache has their graphs
    words = tokenizer(folder / "tokenizer")
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS,
        num_layers=4,
        sample_size=128 if sized else 32 if levels == 4 else 8,
        patch_size=8 if sized else 2,
        cross_attention_dim=48,
        caption_channels=TEXT_WIDTH,
        use_additional_conditions=sized,
    )
    kind = PixArtSigmaPipeline if sigma else PixArtAlphaPipeline
    pipeline = kind(words, text_encoder(len(words)), vae(levels), spread(transformer), DPMSolverMultistepScheduler())
    pipeline.save_pretrained(folder)
    return kind.from_pretrained(folder)


def spread(module: Any, scale: float = SPREAD) -> Any:
    """Random weights that nothing is at zero of, the same for the same module."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * scale / max(1, parameter.shape[-1]) ** 0.5 if parameter.ndim > 1 else parameter)
            if parameter.ndim == 1:
                parameter.add_(0.1 * noise)
    return module.eval()
