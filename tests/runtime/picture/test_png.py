"""Pixels, the grid's exact places, and the PNG."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ilf_trt.errors import InvalidRequest
from ilf_trt.runtime.picture.png import BACKGROUND, GAP, TILE, grid, pixels_from_latents, save_png


def flat(*values: float) -> np.ndarray:
    """One grey picture of one pixel for each value."""
    return np.array(values, np.float32).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize(
    ("latent", "pixel"),
    [(-1, 0), (1, 255), (0, 128), (-7, 0), (7, 255), (-1 + 2 / 255, 1), (1 - 2 / 255, 254), (-0.999, 0), (0.999, 255)],
)
def test_minus_one_to_one_is_rounded_to_0_to_255_and_clipped(latent: float, pixel: int) -> None:
    pixels = pixels_from_latents(flat(latent))
    assert (pixels.dtype, pixels.item()) == (np.uint8, pixel)


def test_every_level_comes_back_from_its_latent() -> None:
    levels = np.arange(256)
    latents = flat(*(levels / 127.5 - 1))
    np.testing.assert_array_equal(pixels_from_latents(latents).ravel(), levels)


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_go_last(channels: int) -> None:
    rng = np.random.default_rng(0)
    latents = rng.uniform(-1, 1, (2, channels, 4, 5)).astype(np.float32)
    pixels = pixels_from_latents(latents)
    assert pixels.shape == (2, 4, 5, channels)
    for channel in range(channels):
        np.testing.assert_array_equal(pixels[:, :, :, [channel]], pixels_from_latents(latents[:, [channel]]))


@pytest.mark.parametrize("channels", [2, 4])
def test_latents_of_other_channels_are_refused_with_a_way_out(channels: int) -> None:
    with pytest.raises(InvalidRequest, match=f"latents of {channels} channels are not pixels; .*--latents-out.*VAE"):
        pixels_from_latents(np.zeros((1, channels, 8, 8), np.float32))


def test_the_callers_latents_are_left_as_they_are() -> None:
    latents = flat(-3, 0.5, 3)
    before = latents.copy()
    pixels_from_latents(latents)
    np.testing.assert_array_equal(latents, before)


def test_grid_puts_tile_i_in_row_i_over_columns_and_column_i_modulo_columns() -> None:
    height, width, columns, count = TILE, TILE + 7, 3, 5
    tiles = np.stack([np.full((height, width, 1), 100 + index, np.uint8) for index in range(count)])
    sheet = grid(tiles, columns)
    wanted = np.full((2 * (height + GAP) + GAP, columns * (width + GAP) + GAP, 1), BACKGROUND, np.uint8)
    for index in range(count):
        row, column = divmod(index, columns)
        top, left = GAP + row * (height + GAP), GAP + column * (width + GAP)
        wanted[top : top + height, left : left + width] = 100 + index
    np.testing.assert_array_equal(sheet, wanted)


def test_a_small_tile_is_enlarged_without_smoothing() -> None:
    tile = np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1)
    sheet = grid(tile, 1)
    zoom = TILE // 8
    assert sheet.shape == (TILE + 2 * GAP, TILE + 2 * GAP, 1)
    np.testing.assert_array_equal(sheet[GAP:-GAP, GAP:-GAP], tile[0].repeat(zoom, axis=0).repeat(zoom, axis=1))


@pytest.mark.parametrize(("height", "shown"), [(63, 126), (64, 64), (65, 65), (1, 64), (48, 96)])
def test_a_tile_is_at_least_64_pixels_high_in_whole_steps(height: int, shown: int) -> None:
    assert grid(np.zeros((1, height, height, 3), np.uint8), 1).shape[0] == shown + 2 * GAP


def test_tiles_that_are_not_square_keep_their_sides_apart() -> None:
    tile = np.random.default_rng(0).integers(0, 255, (1, 64, 96, 3), np.uint8)
    np.testing.assert_array_equal(grid(tile, 4)[GAP:-GAP, GAP:-GAP], tile[0])


def test_more_columns_than_pictures_leave_no_empty_tiles() -> None:
    assert grid(np.zeros((2, 64, 64, 1), np.uint8), 10).shape == (64 + 2 * GAP, 2 * (64 + GAP) + GAP, 1)


@pytest.mark.parametrize("columns", [0, -1])
def test_less_than_one_column_is_refused(columns: int) -> None:
    with pytest.raises(InvalidRequest, match=f"columns is {columns}"):
        grid(np.zeros((1, 64, 64, 1), np.uint8), columns)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_holds_the_same_pixels(channels: int, tmp_path: Path) -> None:
    sheet = np.random.default_rng(0).integers(0, 255, (20, 30, channels), np.uint8)
    save_png(tmp_path / "new" / "folder" / "picture.png", sheet)
    with Image.open(tmp_path / "new" / "folder" / "picture.png") as image:
        assert (image.format, image.mode) == ("PNG", {1: "L", 3: "RGB"}[channels])
        np.testing.assert_array_equal(np.asarray(image).reshape(sheet.shape), sheet)


def test_png_is_written_whatever_the_name_ends_in(tmp_path: Path) -> None:
    save_png(tmp_path / "picture.jpg", np.zeros((4, 4, 1), np.uint8))
    with Image.open(tmp_path / "picture.jpg") as image:
        assert image.format == "PNG"


def test_a_place_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequest, match=r"cannot write .*file/picture\.png: .*; choose another --output"):
        save_png(tmp_path / "file" / "picture.png", np.zeros((4, 4, 1), np.uint8))


def test_a_folder_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot write"):
        save_png(tmp_path, np.zeros((4, 4, 1), np.uint8))
