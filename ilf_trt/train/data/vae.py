"""The VAE that makes latents: a diffusers AutoencoderKL, its scale and shift applied."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from torch import Tensor

from ilf_trt.errors import InvalidRequest
from ilf_trt.train.data.folder import loaded


class Vae:
    """pixels -> scaled latents, in float32: the posterior's mean, or with `sample` drawn from it by the seed."""

    def __init__(self, model: Any, *, device: str = "cpu", sample: bool = False, seed: int = 0) -> None:
        if model.config.get("latents_mean") is not None:
            raise InvalidRequest("this VAE scales every channel by its own mean, which is not supported; take another")
        self.model = model.to(device).eval()
        self.device, self.sample, self.seed = device, sample, seed
        self.shift, self.scale = model.config.get("shift_factor") or 0.0, model.config.scaling_factor

    @classmethod
    def load(cls, source: str, *, device: str = "cpu", sample: bool = False, seed: int = 0) -> "Vae":
        """From a diffusers folder or a hub id, its own or a pipeline's; raises InvalidRequest."""
        return cls(_loaded(source), device=device, sample=sample, seed=seed)

    @torch.inference_mode()
    def encode(self, pixels: Tensor, indices: Sequence[int]) -> Tensor:
        """pixels (B, 3, H, W) in [-1, 1] of the samples `indices` -> (B, C, h, w) on the CPU."""
        posterior = self.model.encode(pixels.to(self.device)).latent_dist
        latents: Tensor = posterior.mean.cpu()
        if self.sample:
            noise = np.stack([_noise(self.seed, index, latents.shape[1:]) for index in indices])
            latents = latents + posterior.std.cpu() * torch.from_numpy(noise)
        return (latents - self.shift) * self.scale


def _loaded(source: str) -> Any:
    def load(options: dict[str, str]) -> Any:
        return AutoencoderKL.from_pretrained(source, use_safetensors=True, torch_dtype=torch.float32, **options)

    return loaded("VAE", source, "vae", load, (SafetensorError,))


def _noise(seed: int, index: int, shape: Sequence[int]) -> Any:
    """A pure function of seed and sample, whatever batch it is in."""
    random = np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64)))
    return random.standard_normal(tuple(shape), np.float32)
