"""What transformers and diffusers give for a pipeline's text encoder and decoder, for `verify` to compare with."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from ilf_trt.contract.reference_cases import DECODE_LATENTS, DECODE_SHADES, TEXT_EMBEDDED, TEXT_IDS, TEXT_MASK
from ilf_trt.contract.spec import DecoderSpec, TextSpec
from ilf_trt.model.t5_folder import load_t5, t5_weights

from .decoder import load_vae
from .folder import PipelineFolder

SEED = 0
LATENT_SIDE = 8  # cells of the latent that is decoded, where the graph takes any
SHARE_OF_MEMORY = 0.5
FLOAT32_BYTES = 4

log = logging.getLogger(__name__)


@torch.inference_mode()
def text_reference(folder: PipelineFolder, spec: TextSpec) -> dict[str, NDArray[Any]]:
    """Two texts of random tokens, one of them short, embedded by transformers in float32, if they fit."""
    source = folder.path / "text_encoder"
    if not _fits(source):
        log.warning("%s is too large to run here beside the build: graph text is not verified", source)
        return {}
    encoder = load_t5(source, torch.float32).eval()
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(0, spec.vocabulary, (2, spec.tokens), generator=generator)
    mask = (torch.arange(spec.tokens) < torch.tensor([[spec.tokens], [max(spec.tokens // 3, 1)]])).long()
    text = encoder(ids, attention_mask=mask).last_hidden_state
    return {
        TEXT_IDS: ids.to(torch.int32).numpy(),
        TEXT_MASK: mask.float().numpy(),
        TEXT_EMBEDDED: text.numpy(),
    }


@torch.inference_mode()
def decoder_reference(folder: PipelineFolder, spec: DecoderSpec) -> dict[str, NDArray[Any]]:
    """One latent decoded by diffusers in float32."""
    vae = load_vae(folder).eval()
    sides = tuple(LATENT_SIDE if isinstance(side, str) else side for side in spec.size)
    latents = torch.randn(1, spec.channels, *sides, generator=torch.Generator().manual_seed(SEED))
    given = latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
    shades = (vae.decode(given, return_dict=False)[0] * 127.5 + 127.5).permute(0, 2, 3, 1)
    return {DECODE_LATENTS: latents.numpy(), DECODE_SHADES: shades.numpy()}


def _fits(folder: Path) -> bool:
    free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return FLOAT32_BYTES * t5_weights(folder).numbers < SHARE_OF_MEMORY * free_bytes
