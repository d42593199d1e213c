"""The replay: finds the bundle of a recorded picture, makes the picture again, and holds the two against each other."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf, log10
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilf_trt.assembly.packaged_bundle import bundle_of
from ilf_trt.contract.bundle import MANIFEST_FILE
from ilf_trt.contract.document import read_json
from ilf_trt.contract.manifest import Manifest
from ilf_trt.contract.packaged import find_packaged
from ilf_trt.contract.progress import Progress
from ilf_trt.errors import BundleError, IlfError, InvalidRequest

from .picture.png import grid, grid_shape
from .picture.png_file import PngFile
from .pipeline import Pipeline
from .provenance import Origin, Provenance, is_folder_name
from .request import picture_size

LARGEST_LEVEL = 255
HASH_CHARS = 12


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far two pictures are apart: the largest difference of 255 levels, the share of their pixels that differ.

    `psnr_db` is the peak signal-to-noise ratio, infinite for equal pictures.
    """

    largest: int
    share: float
    psnr_db: float

    @classmethod
    def of(cls, first: NDArray[np.uint8], second: NDArray[np.uint8]) -> "Agreement":
        """Two pictures (H, W, C) of one shape."""
        distance = np.abs(first.astype(np.int16) - second)
        square = float(np.mean(np.square(distance, dtype=np.int32)))
        return cls(
            largest=int(distance.max()),
            share=float(np.mean(distance.any(axis=-1))),
            psnr_db=10 * log10(LARGEST_LEVEL**2 / square) if square else inf,
        )

    @property
    def same(self) -> bool:
        return self.largest == 0


@dataclass(frozen=True, slots=True)
class Replayed:
    """A picture that was made again, (H, W, C), its own record, and how it agrees with the first one."""

    sheet: NDArray[np.uint8]
    provenance: Provenance
    agreement: Agreement


def find_bundle(origin: Origin, picture: Path, cache: Path | None) -> Path:
    """The bundle that a picture was made with: a packaged one, or a folder of its name, here or beside the picture.

    The name comes from a stranger, so that it only ever names one folder, and such a folder must have the recorded
    digest. Raises InvalidRequest, and as `bundle_of` does.
    """
    name = origin.bundle
    if is_folder_name(name):
        if find_packaged(name) is not None:
            return bundle_of(name, cache)
        for folder in (Path(name), picture.parent / name):
            if _digest_in(folder) == origin.bundle_sha256:
                return folder
    raise InvalidRequest(
        f"no bundle with digest {origin.bundle_sha256[:HASH_CHARS]}… and the name {name!r} lies here or beside "
        f"{picture}; pass --bundle FOLDER"
    )


def replay(
    pipeline: Pipeline,
    png: PngFile,
    provenance: Provenance,
    arrays: Mapping[str, NDArray[Any]],
    latents: NDArray[Any] | None,
    *,
    progress: Progress | None = None,
) -> Replayed:
    """Make the picture of a PNG again; `arrays` and `latents` are the request's own conditions and start noise.

    Raises InvalidRequest for a picture that was cropped, scaled or damaged after it was made, for other arrays than the
    request's, and for a bundle that cannot serve the request.
    """
    arguments = provenance.arguments(arrays, latents)
    with _blaming_another_bundle(pipeline, provenance):
        size = picture_size(pipeline.manifest, provenance.size, binning=provenance.binning)
        _check_sides(png, provenance, size.native if pipeline.manifest.decoder is None else size.requested)
    first = png.pixels()
    with _blaming_another_bundle(pipeline, provenance):
        result = pipeline.generate(**arguments, progress=progress)
    if result.pixels is None:
        raise InvalidRequest(f"{pipeline.bundle.path} gives latents, no pictures; pass the --bundle that has a decoder")
    sheet = grid(result.pixels, provenance.columns)
    if first.shape != sheet.shape:
        raise InvalidRequest(f"{png.path} is {first.shape} (height, width, channels), the bundle makes {sheet.shape}")
    return Replayed(sheet, result.provenance(provenance.columns), Agreement.of(first, sheet))


@contextmanager
def _blaming_another_bundle(pipeline: Pipeline, provenance: Provenance) -> Iterator[None]:
    """What the block refuses is told with the digests if the bundle is not the recorded one."""
    try:
        yield
    except InvalidRequest as error:
        digest, recorded = pipeline.manifest.digest, provenance.origin.bundle_sha256
        if digest == recorded:
            raise
        raise InvalidRequest(
            f"{pipeline.bundle.path} is another bundle (digest {digest[:HASH_CHARS]}…, the picture's is "
            f"{recorded[:HASH_CHARS]}…) and cannot make this picture: {error}"
        ) from error


def _check_sides(png: PngFile, provenance: Provenance, size: tuple[int, int]) -> None:
    """Refuse, before any work, a record that is for more than the picture shows."""
    height, width = grid_shape(provenance.pictures, size, provenance.columns)
    if (png.height, png.width) != (height, width):
        raise InvalidRequest(
            f"{png.path} has {png.height}x{png.width} pixels, its record is of {height}x{width}: it was cropped or "
            "scaled after it was made; give the picture as ilf-trt generate wrote it"
        )


def _digest_in(folder: Path) -> str | None:
    """The digest of the bundle in a folder; None if it holds none."""
    try:
        return Manifest.from_json(read_json(folder / MANIFEST_FILE)).digest
    except (IlfError, BundleError):
        return None
