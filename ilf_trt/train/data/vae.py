"""The VAE that makes latents: a diffusers AutoencoderKL with its scale and shift."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from ilf_trt.errors import InvalidRequest
from ilf_trt.model.pretrained import DIFFUSERS, load_diffusers

from .folder import part_folder


class Vae:
    """pixels -> scaled latents in float32: the mean of the posterior, or with `sample` a draw from it by the seed.

    Raises InvalidRequest for a VAE that scales each channel by its own mean.
    """

    def __init__(self, model: Any, *, device: str = "cpu", sample: bool = False, seed: int = 0) -> None:
        if model.config.get("latents_mean") is not None:
            raise InvalidRequest(
                "this VAE scales every channel by its own mean, which is not supported; use another VAE"
            )
        self.model = model.to(device).eval()
        self.device, self.sample, self.seed = device, sample, seed
        self.cell = 2 ** (len(model.config.block_out_channels) - 1)
        self.shift, self.scale = model.config.get("shift_factor") or 0.0, model.config.scaling_factor

    @classmethod
    def load(cls, source: str, *, device: str = "cpu", sample: bool = False, seed: int = 0) -> "Vae":
        """From a folder or a hub id, of the VAE or of a pipeline; raises CheckpointError, InvalidRequest."""
        folder = part_folder("VAE", source, "vae", (f"{DIFFUSERS}*.safetensors", f"{DIFFUSERS}*.json"))
        return cls(load_diffusers(AutoencoderKL, folder), device=device, sample=sample, seed=seed)

    @torch.inference_mode()
    def encode(self, pixels: Tensor, indices: Sequence[int]) -> Tensor:
        """pixels (B, 3, H, W) in [-1, 1] of the samples `indices` -> latents (B, C, h, w) on the CPU.

        Raises InvalidRequest for sides that the VAE's cells do not divide.
        """
        height, width = pixels.shape[2:]
        if height % self.cell or width % self.cell:
            raise InvalidRequest(
                f"pictures of {height}x{width} pixels do not fit the VAE's cells of {self.cell}; give a --size that "
                f"{self.cell} divides, such as {max(height // self.cell, 1) * self.cell}"
            )
        posterior = self.model.encode(pixels.to(self.device)).latent_dist
        latents: Tensor = posterior.mean.cpu()
        if self.sample:
            noise = np.stack([_noise(self.seed, index, latents.shape[1:]) for index in indices])
            latents = latents + posterior.std.cpu() * torch.from_numpy(noise)
        return (latents - self.shift) * self.scale


def _noise(seed: int, index: int, shape: Sequence[int]) -> Any:
    """Normal noise, a pure function of seed and sample; the batch does not matter."""
    random = np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64)))
    return random.standard_normal(tuple(shape), np.float32)
