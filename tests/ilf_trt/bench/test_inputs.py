"""What processes hand to one another, and how far two arrays are apart."""

from pathlib import Path

import numpy as np
import pytest

from ilf_trt.bench.inputs import decibels, read_inputs, relative_difference, write_inputs

REFERENCE = np.array([-5.0, 0.0, 3.0], np.float32)


def test_noise_and_conditions_come_back_as_they_were(tmp_path: Path) -> None:
    noise, labels = np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2), np.array([3], np.int32)
    write_inputs(tmp_path / "inputs.npz", noise, {"class_labels": labels})
    got, conditions = read_inputs(tmp_path / "inputs.npz")
    assert np.array_equal(got, noise)
    assert list(conditions) == ["class_labels"]
    assert conditions["class_labels"].dtype == np.int32


def test_only_arrays_of_numbers_are_written(tmp_path: Path) -> None:
    noise = np.zeros((1, 1, 2, 2), np.float32)
    with pytest.raises(ValueError, match="'prompts' holds Python objects, expected numbers"):
        write_inputs(tmp_path / "inputs.npz", noise, {"prompts": np.array([{}], object)})


def test_decibels_are_of_the_references_range() -> None:
    assert decibels(REFERENCE + np.float32(0.8), REFERENCE) == pytest.approx(20.0, abs=1e-5)
    assert decibels(REFERENCE, REFERENCE) is None
    assert decibels(REFERENCE, np.ones(3, np.float32)) is None


def test_a_relative_difference_is_of_the_references_largest_magnitude() -> None:
    other = REFERENCE + np.array([0.0, 0.0, 0.5], np.float32)
    assert relative_difference(other, REFERENCE) == pytest.approx(0.1)
    assert relative_difference(REFERENCE, REFERENCE) == 0.0
    assert relative_difference(REFERENCE, np.zeros(3, np.float32)) is None
