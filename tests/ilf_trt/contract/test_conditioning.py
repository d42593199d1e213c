"""Conditions at the door: read from a file, checked against their ports, padded, doubled for guidance."""

from contextlib import suppress
from dataclasses import replace
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ilf_trt.contract.arrays import as_array, read_conditions
from ilf_trt.contract.conditioning import RESERVED, Conditioning
from ilf_trt.contract.ports import Role
from ilf_trt.errors import InvalidRequest
from ilf_trt.runtime.pipeline import Pipeline
from ilf_trt.runtime.request import Request

Conditions = dict[str, Any]

TOKENS, CHANNELS, CLASSES = 5, 3, 10
LABELS = Conditioning.of_labels(CLASSES)
TEXT = Conditioning(
    tuple(port for port in Conditioning.of_text(TOKENS, CHANNELS, sized=True).positive if port.name != "resolution"),
    None,
)


def text(pictures: int = 2, tokens: int = TOKENS) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((pictures, tokens, CHANNELS), np.float32)


def given(**changes: Any) -> Conditions:
    """Conditions that fit, with some replaced and those that are None left out."""
    values = {"text": text(), "text_mask": np.ones((2, TOKENS), np.float32), "aspect_ratio": np.ones((2, 1))}
    return {name: value for name, value in {**values, **changes}.items() if value is not None}


def refused(conditioning: Conditioning, conditions: Conditions, match: str) -> None:
    with pytest.raises(InvalidRequest, match=match) as caught:
        conditioning.validate(conditions, guidance=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_a_condition_named_as_an_argument_of_a_request_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"a condition is named '{name}'"):
        Conditioning((replace(LABELS.positive[0], name=name),), CLASSES)


def test_every_argument_of_a_request_is_reserved() -> None:
    parameters = [*signature(Request.of).parameters.values(), *signature(Pipeline.generate).parameters.values()]
    names = {parameter.name for parameter in parameters if parameter.kind is not Parameter.VAR_KEYWORD}
    assert names - {"class_labels"} | {"manifest"} == RESERVED


# --- what fits


@pytest.mark.parametrize("labels", [[3, 8], (3, 8), np.array([3, 8]), np.array([3, 8], np.uint8)], ids=repr)
def test_labels_come_back_in_the_dtype_of_their_port_with_their_number(labels: Any) -> None:
    arrays, pictures = LABELS.validate({"class_labels": labels}, guidance=False)
    assert pictures == 2
    assert arrays["class_labels"].dtype == np.int32
    assert arrays["class_labels"].tolist() == [3, 8]


def test_every_class_and_the_null_class_are_labels() -> None:
    arrays, pictures = LABELS.validate({"class_labels": range(CLASSES + 1)}, guidance=False)
    assert (pictures, arrays["class_labels"].max()) == (CLASSES + 1, CLASSES)


def test_conditions_come_back_in_the_order_of_their_ports() -> None:
    arrays, pictures = TEXT.validate(dict(reversed(given().items())), guidance=False)
    assert list(arrays) == [port.name for port in TEXT.positive]
    assert pictures == 2


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_text_of_any_float_width_is_taken(dtype: str) -> None:
    arrays, _ = TEXT.validate(given(text=text().astype(dtype)), guidance=False)
    assert arrays["text"].dtype == np.float32
    np.testing.assert_array_equal(arrays["text"], text().astype(dtype).astype(np.float32))


@pytest.mark.parametrize("tokens", [1, 4, TOKENS])
def test_short_text_without_a_mask_is_padded_under_a_zero_mask(tokens: int) -> None:
    arrays, _ = TEXT.validate(given(text=text(tokens=tokens), text_mask=None), guidance=False)
    np.testing.assert_array_equal(arrays["text"][:, :tokens], text(tokens=tokens))
    assert arrays["text"].shape == (2, TOKENS, CHANNELS)
    assert not arrays["text"][:, tokens:].any()
    assert arrays["text_mask"].tolist() == [[1.0] * tokens + [0.0] * (TOKENS - tokens)] * 2


def test_a_mask_as_short_as_its_text_is_padded_with_zeros() -> None:
    arrays, _ = TEXT.validate(given(text=text(tokens=3), text_mask=[[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]), guidance=False)
    assert arrays["text_mask"].tolist() == [[1.0, 1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0]]


def test_what_the_caller_gave_is_not_written_to() -> None:
    conditions = given(text=text(tokens=3), text_mask=None)
    TEXT.validate(conditions, guidance=False)
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


# --- what the model makes of them


SIZED = Conditioning.of_text(TOKENS, CHANNELS, sized=True)


def test_guidance_asks_for_what_the_picture_shall_not_show() -> None:
    names = [port.name for port in SIZED.ports(guidance=True)]
    assert names == ["text", "text_mask", "negative_text", "negative_text_mask", "resolution", "aspect_ratio"]
    assert [port.name for port in LABELS.ports(guidance=True)] == ["class_labels"]
    assert [port.name for port in SIZED.row_ports("R")] == ["text", "text_mask", "resolution", "aspect_ratio"]


def test_a_guided_batch_has_the_null_class_in_its_second_half() -> None:
    labels = np.array([3, 8], np.int32)
    rows = LABELS.rows({"class_labels": labels}, guided=True)["class_labels"]
    assert (rows.dtype, rows.tolist()) == (np.int32, [3, 8, CLASSES, CLASSES])
    assert LABELS.rows({"class_labels": labels}, guided=False)["class_labels"].tolist() == [3, 8]


def test_a_guided_batch_has_the_negative_text_in_its_second_half_and_sizes_twice() -> None:
    values = SIZED.example(2, (8, 16), guidance=True, normal=lambda shape: np.random.default_rng(1).random(shape))
    values["negative_text"] = values["text"] + 1
    rows = SIZED.rows(values, guided=True)
    np.testing.assert_array_equal(rows["text"], np.concatenate([values["text"], values["text"] + 1]))
    np.testing.assert_array_equal(rows["resolution"], [[8, 16]] * 4)


@pytest.mark.parametrize("conditioning", [LABELS, SIZED], ids=["labels", "text"])
@pytest.mark.parametrize("guidance", [True, False])
def test_an_example_passes_its_own_check(conditioning: Conditioning, guidance: bool) -> None:
    arrays, pictures = conditioning.validate(conditioning.example(3, (8, 8), guidance=guidance), guidance=guidance)
    assert pictures == 3
    assert list(arrays) == [port.name for port in conditioning.ports(guidance=guidance)]


def test_sizes_are_filled_in_unless_the_caller_gives_them() -> None:
    values = SIZED.with_size({"text": text()}, (32, 64))
    assert values["resolution"].tolist() == [[32.0, 64.0]] * 2
    assert values["aspect_ratio"].tolist() == [[0.5]] * 2
    own = {"text": text(), "resolution": np.ones((2, 2)), "aspect_ratio": np.ones((2, 1))}
    assert SIZED.with_size(own, (32, 64)) == own
    assert LABELS.with_size({"class_labels": [1]}, (32, 64)) == {"class_labels": [1]}


def test_a_sample_becomes_conditions_or_is_refused_by_what_it_lacks() -> None:
    assert LABELS.from_sample(size=(8, 8), label=3) == {"class_labels": 3}
    values = SIZED.from_sample(size=(8, 16), text="t", mask="m")
    assert values == {"text": "t", "text_mask": "m", "resolution": [8.0, 16.0], "aspect_ratio": [0.5]}
    with pytest.raises(InvalidRequest, match="a sample has no label"):
        LABELS.from_sample(size=(8, 8), text="t")


def test_ports_are_found_by_their_role() -> None:
    assert LABELS.port(Role.LABEL) == LABELS.positive[0]
    assert LABELS.port(Role.TEXT) is None
    assert SIZED.classes is None


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
