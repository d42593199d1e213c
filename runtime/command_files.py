"""The files that the commands of the runtime read and write; each function raises InvalidRequest in one line."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilf_trt.contract.arrays import MOST_BYTES, MOST_NUMBERS, UNREADABLE, read_npy
from ilf_trt.contract.document import DocumentError, read_json
from ilf_trt.contract.plan import StepPlan
from ilf_trt.errors import InvalidRequest, one_line
from ilf_trt.files import check_writable, open_regular, read_bytes, write_whole

MOST_TEXT_BYTES = 1 << 24


def check_place(option: str, place: Path, suffix: str) -> None:
    """Refuse a name of another format, and a place that cannot be written, before any work."""
    if place.suffix.lower() != suffix:
        raise InvalidRequest(f"{option} writes a {suffix} file, got {place}; give a name that ends in {suffix}")
    try:
        check_writable(place)
    except OSError as error:
        raise _unwritable(option, place, error) from error


def prompts_in(path: Path) -> list[str]:
    """The prompts of a text file, one a line."""
    try:
        lines = read_bytes(path, most=MOST_TEXT_BYTES).decode("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        reason = one_line(error)
        raise InvalidRequest(f"{path} is not a readable text file ({reason}); give one prompt a line") from error
    texts = [line.strip() for line in lines if line.strip()]
    if not 0 < len(texts) <= MOST_NUMBERS:
        raise InvalidRequest(f"{path} holds {len(texts)} prompts, expected 1 to {MOST_NUMBERS}; give one a line")
    return texts


def plan_in(path: Path) -> StepPlan:
    """The step plan in a JSON file."""
    try:
        data = read_json(path)
    except DocumentError as error:
        raise InvalidRequest(f"step plan {error}; make one with ilf-trt plan --json") from error
    return StepPlan.from_json(data)


def array_in(path: Path) -> NDArray[Any]:
    """One array of at most `MOST_BYTES`, whose header says what the file really holds."""
    try:
        with open_regular(path) as file:
            return read_npy(file, size_bytes=min(path.stat().st_size, MOST_BYTES))
    except UNREADABLE as error:
        raise InvalidRequest(f"{path} is not a readable .npy ({one_line(error)}); write it with numpy.save") from error


def save_latents(path: Path, latents: NDArray[np.float32]) -> None:
    """Write latents (B, C, H, W) as .npy."""
    content = BytesIO()
    np.save(content, latents, allow_pickle=False)
    try:
        write_whole(path, content.getvalue())
    except OSError as error:
        raise _unwritable("--latents-out", path, error) from error


def _unwritable(option: str, place: Path, error: OSError) -> InvalidRequest:
    return InvalidRequest(f"cannot write {place}: {one_line(error)}; choose another {option}")
