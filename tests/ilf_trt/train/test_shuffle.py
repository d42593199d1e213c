"""The order of rows: each epoch a permutation of its own, any place known at once."""

from ilf_trt.train.shuffle import Shuffle


def test_every_epoch_has_each_row_once() -> None:
    rows = Shuffle(7, 3).rows(0, 21).reshape(3, 7)
    assert [sorted(epoch) for epoch in rows.tolist()] == [list(range(7))] * 3


def test_epochs_and_seeds_have_their_own_order() -> None:
    first, second = Shuffle(20, 3).rows(0, 40).reshape(2, 20).tolist()
    assert first != second
    assert Shuffle(20, 4).rows(0, 20).tolist() != first


def test_a_stretch_in_the_middle_is_that_of_the_whole() -> None:
    assert Shuffle(7, 3).rows(5, 11).tolist() == Shuffle(7, 3).rows(0, 16).tolist()[5:]
    assert Shuffle(7, 3).epochs(5, 4).tolist() == [0, 0, 1, 1]
