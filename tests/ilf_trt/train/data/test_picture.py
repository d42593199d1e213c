"""Pictures as pixels."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ilf_trt.errors import BrokenSample
from ilf_trt.train.data.picture import pixels_of
from tests.ilf_trt.train.data.conftest import encoded


def saved(picture: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def test_pixels_of_the_right_size_are_kept_and_lie_from_minus_one_to_one() -> None:
    data = encoded(0)
    with Image.open(io.BytesIO(data)) as picture:
        want = np.asarray(picture, np.float32).transpose(2, 0, 1) / 127.5 - 1
    got = pixels_of("a", data, size=8, channels=3)
    assert got.dtype == torch.float32
    np.testing.assert_array_equal(got, want)


def test_a_file_and_its_bytes_give_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(1))
    assert torch.equal(
        pixels_of("a", tmp_path / "a.png", size=4, channels=3), pixels_of("a", encoded(1), size=4, channels=3)
    )


@pytest.mark.parametrize("size", [(16, 8), (8, 16)], ids=["wide", "tall"])
def test_the_centre_is_kept(size: tuple[int, int]) -> None:
    picture = Image.new("RGB", size, "red")
    left, top = (length // 2 - 4 for length in size)
    picture.paste("blue", (left, top, left + 8, top + 8))
    pixels = pixels_of("a", saved(picture), size=4, channels=3)
    assert pixels.shape == (3, 4, 4)
    assert torch.equal(pixels.flatten(1).unique(dim=1), torch.tensor([[-1.0], [-1.0], [1.0]]))


def test_one_channel_is_grey() -> None:
    assert pixels_of("a", encoded(0), size=8, channels=1).shape == (1, 8, 8)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_becomes_white(mode: str) -> None:
    picture = Image.new("RGBA", (8, 8), (255, 0, 0, 0)).convert(mode)
    options = {"transparency": picture.getpixel((0, 0))} if mode == "P" else {}
    assert torch.equal(pixels_of("a", saved(picture, **options), size=8, channels=3), torch.ones(3, 8, 8))


def test_a_picture_that_lies_on_its_side_is_set_upright() -> None:
    picture = Image.new("RGB", (8, 8), "black")
    picture.paste("white", (0, 0, 4, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    pixels = pixels_of("a", saved(picture, exif=exif), size=8, channels=1)
    assert torch.equal(pixels[0, :4], torch.ones(4, 8))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"no picture", "not a picture"),
        (b"", "not a picture"),
        (encoded(0, 64)[:2000], "truncated"),
        (encoded(0, 64, "JPEG")[:1500], "truncated"),
        (saved(Image.new("I;16", (8, 8))), "8 bits"),
        (Path("nowhere/a.png"), "No such file"),
    ],
    ids=["text", "empty", "half a PNG", "half a JPEG", "16 bits", "missing"],
)
def test_what_cannot_be_read_is_named_with_the_reason(data: bytes | Path, reason: str) -> None:
    with pytest.raises(BrokenSample, match=f"cat/1: .*{reason}"):
        pixels_of("cat/1", data, size=8, channels=3)
