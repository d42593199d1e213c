"""Decodes latents to pictures, one at a time; a large picture in overlapping tiles with blended borders."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ilf_trt.contract.arrays import is_finite
from ilf_trt.contract.ports import DECODE
from ilf_trt.contract.spec import DecoderSpec
from ilf_trt.errors import NonFinite
from ilf_trt.runtime.finite import remedy
from ilf_trt.runtime.session import Session

from .resize import resize_and_crop

Floats = NDArray[np.float32]
OVERLAP = 0.25  # share of a tile's side that two neighbours have in common


class Decoder:
    """Runs graph `decode` on each picture, or on each tile of a large picture."""

    def __init__(self, run: Callable[[Floats], Floats], spec: DecoderSpec) -> None:
        """`run` turns latents (1, C, h, w) into shades (1, H, W, 3); its next call may overwrite them."""
        self._run, self._spec = run, spec

    def decode(self, latents: Floats, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        """latents (B, C, h, w) -> pixels (B, H, W, 3), scaled and cropped to `size` (height, width) if there is one.

        Raises NonFinite if the shades of a picture hold NaN or infinity.
        """
        scale = self._spec.scale
        count, _, height, width = latents.shape
        pixels = np.empty((count, *(size or (height * scale, width * scale)), 3), np.uint8)
        for index in range(count):
            one, name = latents[index : index + 1], f"picture {index + 1} of {count}"
            shades = self._decode_tiles(one[0], name)[None] if self._is_large(one) else self._decode_tile(one, name)
            if size is not None:
                with np.errstate(over="ignore", invalid="ignore"):  # the difference of two huge shades
                    shades = self._checked(resize_and_crop(shades, *size), name)
            np.clip(shades, 0, 255, out=shades)
            np.rint(shades, out=shades)
            pixels[index] = shades[0]
        return pixels

    def _is_large(self, latents: Floats) -> bool:
        return bool(self._spec.tile) and max(latents.shape[2:]) > self._spec.tile

    def _decode_tile(self, latents: Floats, name: str) -> Floats:
        return self._checked(self._run(latents), name)

    def _checked(self, shades: Floats, name: str) -> Floats:
        if is_finite(shades):
            return shades
        raise NonFinite(f"graph {DECODE} gave NaN or infinity for {name}; {remedy(DECODE, self._spec.precision)}")

    def _decode_tiles(self, latent: Floats, name: str) -> Floats:
        """latent (C, h, w) -> shades (H, W, 3); each tile fades into the tile above it and the tile to its left.

        The tiles are those of diffusers' AutoencoderKL: neighbours share a quarter of a side, the last are smaller.
        """
        scale, tile = self._spec.scale, self._spec.tile
        step, overlap = int(tile * (1 - OVERLAP)), int(tile * scale * OVERLAP)
        side = tile * scale - overlap
        _, height, width = latent.shape
        picture = np.empty((height * scale, width * scale, 3), np.float32)
        above: list[Floats] = []
        for row, top in enumerate(range(0, height, step)):
            tiles: list[Floats] = []
            for column, left in enumerate(range(0, width, step)):
                shades = self._decode_tile(latent[None, :, top : top + tile, left : left + tile], name)[0].copy()
                if row:
                    _fade(above[column], shades, overlap)
                if column:
                    _fade(tiles[-1].swapaxes(0, 1), shades.swapaxes(0, 1), overlap)
                tiles.append(shades)
                corner = picture[top * scale : top * scale + side, left * scale : left * scale + side]
                corner[:] = shades[: corner.shape[0], : corner.shape[1]]
            above = tiles
        return picture


def decode_tile(session: Session, spec: DecoderSpec, tile: Floats) -> Floats:
    """One run of graph `decode` in a session: latents (1, C, h, w) -> shades (1, H, W, 3), valid until the next run."""
    height, width = tile.shape[2:]
    symbols = {"H": height, "W": width}
    symbols |= {f"{spec.scale}{name}": side * spec.scale for name, side in symbols.items()}
    call = session.call(spec.graph, symbols)
    call.inputs["latents"][:] = tile
    call()
    return call.outputs["shades"]


def _fade(before: Floats, after: Floats, overlap: int) -> None:
    """Blend the last rows of `before` into the first rows of `after`, in place."""
    overlap = min(len(before), len(after), overlap)
    weight = (np.arange(overlap, dtype=np.float32) / overlap)[:, None, None]
    after[:overlap] = before[len(before) - overlap :] * (1 - weight) + after[:overlap] * weight
