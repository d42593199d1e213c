"""From a recipe to a training: the labels of the sample grids."""

import pytest

from ilf_trt.errors import InvalidRequest
from ilf_trt.train.run import labels_of


def test_labels_are_numbers_and_ranges() -> None:
    assert labels_of("0-2, 7", 10) == (0, 1, 2, 7)
    for text in ("", "3-", "a", "2-1", "-1"):
        with pytest.raises(InvalidRequest, match=r"logging\.labels is"):
            labels_of(text, 10)
