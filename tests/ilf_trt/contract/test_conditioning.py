"""Conditions at the door: read from a file, checked against their ports, padded."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ilf_trt.contract.arrays import as_array, check_conditions, read_conditions
from ilf_trt.contract.ports import Port
from ilf_trt.errors import InvalidRequest

Conditions = dict[str, Any]

TOKENS, CHANNELS, CLASSES = 5, 3, 10
LABELS = (Port("class_labels", ("B",), "int32", below=CLASSES + 1),)
TEXT = (
    Port("text", ("B", TOKENS, CHANNELS), "float32"),
    Port("text_mask", ("B", TOKENS), "float32"),
    Port("aspect_ratio", ("B", 1), "float32"),
)


def text(pictures: int = 2, tokens: int = TOKENS) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((pictures, tokens, CHANNELS), np.float32)


def given(**changes: Any) -> Conditions:
    """Conditions that fit, with some replaced and those that are None left out."""
    values = {"text": text(), "text_mask": np.ones((2, TOKENS), np.float32), "aspect_ratio": np.ones((2, 1))}
    return {name: value for name, value in {**values, **changes}.items() if value is not None}


def refused(ports: tuple[Port, ...], conditions: Conditions, match: str) -> None:
    with pytest.raises(InvalidRequest, match=match) as caught:
        check_conditions(ports, conditions)
    assert "\n" not in str(caught.value)


# --- what fits


@pytest.mark.parametrize("labels", [[3, 8], (3, 8), np.array([3, 8]), np.array([3, 8], np.uint8)], ids=repr)
def test_labels_come_back_in_the_dtype_of_their_port_with_their_number(labels: Any) -> None:
    arrays, pictures = check_conditions(LABELS, {"class_labels": labels})
    assert pictures == 2
    assert arrays["class_labels"].dtype == np.int32
    assert arrays["class_labels"].tolist() == [3, 8]


def test_every_class_and_the_null_class_are_labels() -> None:
    arrays, pictures = check_conditions(LABELS, {"class_labels": range(CLASSES + 1)})
    assert (pictures, arrays["class_labels"].max()) == (CLASSES + 1, CLASSES)


def test_conditions_come_back_in_the_order_of_their_ports() -> None:
    arrays, pictures = check_conditions(TEXT, dict(reversed(given().items())))
    assert list(arrays) == [port.name for port in TEXT]
    assert pictures == 2


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_text_of_any_float_width_is_taken(dtype: str) -> None:
    arrays, _ = check_conditions(TEXT, given(text=text().astype(dtype)))
    assert arrays["text"].dtype == np.float32
    np.testing.assert_array_equal(arrays["text"], text().astype(dtype).astype(np.float32))


@pytest.mark.parametrize("tokens", [1, 4, TOKENS])
def test_short_text_without_a_mask_is_padded_under_a_zero_mask(tokens: int) -> None:
    arrays, _ = check_conditions(TEXT, given(text=text(tokens=tokens), text_mask=None))
    np.testing.assert_array_equal(arrays["text"][:, :tokens], text(tokens=tokens))
    assert arrays["text"].shape == (2, TOKENS, CHANNELS)
    assert not arrays["text"][:, tokens:].any()
    assert arrays["text_mask"].tolist() == [[1.0] * tokens + [0.0] * (TOKENS - tokens)] * 2


def test_a_mask_as_short_as_its_text_is_padded_with_zeros() -> None:
    arrays, _ = check_conditions(TEXT, given(text=text(tokens=3), text_mask=[[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))
    assert arrays["text_mask"].tolist() == [[1.0, 1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0]]


def test_what_the_caller_gave_is_not_written_to() -> None:
    conditions = given(text=text(tokens=3), text_mask=None)
    check_conditions(TEXT, conditions)
    assert conditions.keys() == {"text", "aspect_ratio"}
    np.testing.assert_array_equal(conditions["text"], text(tokens=3))


# --- what does not


def test_an_unknown_condition_is_refused_with_the_known_ones() -> None:
    refused(LABELS, {"class_label": [1]}, "^'class_label' is not a condition of this bundle; it takes class_labels")


@pytest.mark.parametrize("name", ["text", "aspect_ratio"])
def test_a_missing_condition_is_refused_by_name(name: str) -> None:
    refused(TEXT, given(**{name: None, "text_mask": None}), f"^'{name}.*' is missing; this bundle takes text, ")


def test_conditions_of_nothing_are_refused_by_the_first_missing_one() -> None:
    refused(LABELS, {}, "^'class_labels' is missing")


def test_a_mask_of_another_length_than_its_text_is_refused() -> None:
    wanted = rf"^text_mask is \(2, 3\), its text is \(2, 4, {CHANNELS}\); give a number for each token"
    refused(TEXT, given(text=text(tokens=4), text_mask=np.ones((2, 3))), wanted)


def test_text_longer_than_the_models_is_refused() -> None:
    longer = given(text=text(tokens=TOKENS + 1), text_mask=None)
    refused(TEXT, longer, rf"text has shape \(2, {TOKENS + 1}, {CHANNELS}\), expected")


@pytest.mark.parametrize("name", ["text", "aspect_ratio"])
def test_conditions_for_different_numbers_of_pictures_are_refused(name: str) -> None:
    refused(TEXT, given(**{name: given()[name][:1]}), "is for 1 pictures, another condition for 2; give the same")


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        ([1.0], "class_labels is float64, expected whole numbers"),
        ([True], "class_labels is bool, expected whole numbers"),
        (["1"], "class_labels is <U1, expected whole numbers"),
        (None, "class_labels is object, expected whole numbers"),
        ([], "class_labels"),
        (3, r"class_labels has shape \(\), expected \('B',\), B >= 1"),
        ([[1]], r"class_labels has shape \(1, 1\)"),
        (np.zeros(0, np.int64), r"class_labels has shape \(0,\), expected \('B',\), B >= 1"),
        ([1, CLASSES + 1, -2], f"class_labels holds {CLASSES + 1}, expected 0 to {CLASSES}$"),
        ([0, -1], f"class_labels holds -1, expected 0 to {CLASSES}$"),
    ],
    ids=repr,
)
def test_labels_that_do_not_fit_are_refused(labels: Any, match: str) -> None:
    refused(LABELS, {"class_labels": labels}, match)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e300])
def test_values_that_are_not_finite_in_float32_are_refused(value: float) -> None:
    refused(TEXT, given(aspect_ratio=np.array([[1.0], [value]])), "aspect_ratio holds NaN or infinity")


def test_whole_numbers_where_floats_are_wanted_are_refused() -> None:
    refused(TEXT, given(aspect_ratio=np.ones((2, 1), int)), "aspect_ratio is int64, expected floating point")


@pytest.mark.parametrize("name", ["text", "aspect_ratio"])
def test_ragged_values_are_refused(name: str) -> None:
    refused(TEXT, given(**{name: [[1.0], [1.0, 2.0]]}), f"^{name} is ragged .*; give one shape$")


def test_a_ragged_array_is_refused_by_its_name() -> None:
    with pytest.raises(InvalidRequest, match=r"^latents is ragged"):
        as_array("latents", [[1.0], [1.0, 2.0]])


# --- files


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_is_read_under_its_names(save: Any, tmp_path: Path) -> None:
    save(tmp_path / "text.npz", **given())
    arrays = read_conditions(tmp_path / "text.npz")
    assert arrays.keys() == given().keys()
    np.testing.assert_array_equal(arrays["text"], text())


def unreadable(path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"is not a readable \.npz \(.*\); write it with numpy\.savez$") as caught:
        read_conditions(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04 cut short"], ids=["empty", "junk", "cut zip"])
def test_a_file_that_is_no_npz_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_bytes(content)
    unreadable(tmp_path / "text.npz")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    unreadable(tmp_path / "none.npz")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    unreadable(tmp_path)


def test_a_single_array_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "text.npz").open("wb") as file:
        np.save(file, text())
    unreadable(tmp_path / "text.npz")


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "text.npz", text=np.array([{"a": 1}], object))
    unreadable(tmp_path / "text.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_file_with_any_byte_changed_is_read_or_refused(save: Any, tmp_path: Path) -> None:
    path = tmp_path / "text.npz"
    save(path, text=text(1, 1))
    good = path.read_bytes()
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0b1001]) + good[place + 1 :])
        with suppress(InvalidRequest):
            read_conditions(path)
