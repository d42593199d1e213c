"""Pictures from latents: one at a time, and a large one in overlapping tiles whose borders are blended."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ilf_trt.contract import DecoderSpec

Latents = NDArray[np.float32]
Pixels = NDArray[np.uint8]


class Decoder:
    """Runs graph `decode`; what `run` gives is overwritten by its next call."""

    def __init__(self, run: Callable[[Latents], Pixels], spec: DecoderSpec) -> None:
        """`run` takes latents (1, C, h, w) of the graph's size and gives pixels (1, H, W, 3)."""
        self._run, self._spec = run, spec

    def decode(self, latents: Latents) -> Pixels:
        """latents (B, C, h, w) -> pixels (B, H, W, 3)."""
        scale = self._spec.scale
        count, _, height, width = latents.shape
        pixels = np.empty((count, height * scale, width * scale, 3), np.uint8)
        for index in range(count):
            one = latents[index : index + 1]
            pixels[index] = self._tiled(one[0]) if self._spec.overlap else self._run(one)[0]
        return pixels

    def _tiled(self, latent: Latents) -> Pixels:
        """latent (C, h, w) -> (H, W, 3): every tile weighs less towards the borders that it shares.

        As diffusers' tiled decoding, neighbours share `overlap` cells over which one fades into the other. The last
        tile of a row or column begins earlier instead of being smaller: the graph takes whole tiles alone.
        """
        scale, overlap = self._spec.scale, self._spec.overlap
        _, height, width = latent.shape
        side, across = (int(side) for side in self._spec.size)
        latent = _filled(latent, side, across)
        made = np.zeros((latent.shape[1] * scale, latent.shape[2] * scale, 3), np.float32)
        weights = np.zeros((*made.shape[:2], 1), np.float32)
        rows, columns = _begins(latent.shape[1], side, overlap), _begins(latent.shape[2], across, overlap)
        for top in rows:
            down = _fade(top, side, rows, latent.shape[1]).repeat(scale)
            for left in columns:
                tile = self._run(latent[None, :, top : top + side, left : left + across])[0]
                weight = (down[:, None] * _fade(left, across, columns, latent.shape[2]).repeat(scale)[None, :])[
                    ..., None
                ]
                place = np.s_[top * scale : (top + side) * scale, left * scale : (left + across) * scale]
                made[place] += weight * tile
                weights[place] += weight
        shades = np.round(made / weights)[: height * scale, : width * scale]
        return shades.astype(np.uint8)


def _filled(latent: Latents, side: int, across: int) -> Latents:
    """At least a tile large, its edges repeated."""
    _, height, width = latent.shape
    return np.pad(latent, ((0, 0), (0, max(0, side - height)), (0, max(0, across - width))), mode="edge")


def _begins(length: int, side: int, overlap: int) -> list[int]:
    begins = list(range(0, max(length - side, 0) + 1, side - overlap))
    if begins[-1] + side < length:
        begins.append(length - side)
    return begins


def _fade(begin: int, side: int, begins: list[int], length: int) -> NDArray[np.float32]:
    """(side,): 1 in the middle of a tile, falling to 0 over what it shares with its neighbours."""
    weight = np.ones(side, np.float32)
    index = begins.index(begin)
    if index > 0:
        shared = begins[index - 1] + side - begin
        weight[:shared] *= (np.arange(shared, dtype=np.float32) + 0.5) / shared
    if index + 1 < len(begins):
        shared = begin + side - begins[index + 1]
        weight[side - shared :] *= (shared - np.arange(shared, dtype=np.float32) - 0.5) / shared
    return weight
