"""Pictures from latents: one at a time, and a large one in overlapping tiles whose borders are blended."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ilf_trt.contract.spec import DecoderSpec
from ilf_trt.runtime.picture.resize import resized_and_cropped
from ilf_trt.runtime.session import Session

Floats = NDArray[np.float32]
OVERLAP = 0.25  # of a tile's side that neighbours share


class Decoder:
    """Runs graph `decode`; what `run` gives is overwritten by its next call."""

    def __init__(self, run: Callable[[Floats], Floats], spec: DecoderSpec) -> None:
        """`run` takes latents (1, C, h, w) of the graph's size and gives shades (1, H, W, 3)."""
        self._run, self._spec = run, spec

    def decode(self, latents: Floats, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        """latents (B, C, h, w) -> pixels (B, H, W, 3), scaled and cropped to `size` (height, width) if it is given."""
        scale = self._spec.scale
        count, _, height, width = latents.shape
        pixels = np.empty((count, *(size or (height * scale, width * scale)), 3), np.uint8)
        for index in range(count):
            one = latents[index : index + 1]
            shades = self._tiled(one[0])[None] if self._is_large(one) else self._run(one)
            if size is not None:
                shades = resized_and_cropped(shades, *size)
            np.nan_to_num(shades, copy=False)
            np.clip(shades, 0, 255, out=shades)
            np.rint(shades, out=shades)
            pixels[index] = shades[0]
        return pixels

    def _is_large(self, latents: Floats) -> bool:
        return bool(self._spec.tile) and max(latents.shape[2:]) > self._spec.tile

    def _tiled(self, latent: Floats) -> Floats:
        """latent (C, h, w) -> shades (H, W, 3), tile by tile, each fading into the one above and the one to its left.

        As diffusers' AutoencoderKL decodes in tiles: they share a quarter of a side, the last ones are smaller.
        """
        scale, tile = self._spec.scale, self._spec.tile
        step, shared = int(tile * (1 - OVERLAP)), int(tile * scale * OVERLAP)
        kept = tile * scale - shared
        _, height, width = latent.shape
        made = np.empty((height * scale, width * scale, 3), np.float32)
        above: list[Floats] = []
        for row, top in enumerate(range(0, height, step)):
            tiles: list[Floats] = []
            for column, left in enumerate(range(0, width, step)):
                shades = self._run(latent[None, :, top : top + tile, left : left + tile])[0].copy()
                if row:
                    _fade(above[column], shades, shared)
                if column:
                    _fade(tiles[-1].swapaxes(0, 1), shades.swapaxes(0, 1), shared)
                tiles.append(shades)
                place = made[top * scale : top * scale + kept, left * scale : left * scale + kept]
                place[:] = shades[: place.shape[0], : place.shape[1]]
            above = tiles
        return made


def decode_tile(session: Session, spec: DecoderSpec, tile: Floats) -> Floats:
    """One run of graph `decode` in a session: latents (1, C, h, w) -> shades (1, H, W, 3), valid until the next run."""
    height, width = tile.shape[2:]
    symbols = {"H": height, "W": width}
    symbols |= {f"{spec.scale}{name}": side * spec.scale for name, side in symbols.items()}
    call = session.call(spec.graph, symbols)
    call.inputs["latents"][:] = tile
    call()
    return call.outputs["shades"]


def _fade(before: Floats, after: Floats, shared: int) -> None:
    """Blend the last rows of `before` into the first of `after`, in place."""
    shared = min(len(before), len(after), shared)
    weight = (np.arange(shared, dtype=np.float32) / shared)[:, None, None]
    after[:shared] = before[len(before) - shared :] * (1 - weight) + after[:shared] * weight
