"""The stream from memory: every row once an epoch, the same rows from any start, and rows without a condition."""

from itertools import islice

import pytest
import torch

from ilf_trt.errors import InvalidRequest
from ilf_trt.train.batch_stream import Batch, MemoryStream, StreamItem
from tests.small_training import dit_rows, pixart_rows

ROWS = 23


def stream(batch: int = 5, seed: int = 0) -> MemoryStream:
    return MemoryStream(dit_rows(ROWS), global_batch=batch, seed=seed)


def items(of: MemoryStream, count: int, *, start: int = 1, rank: int = 0, world: int = 1) -> list[StreamItem]:
    return list(islice(of.batches(start_iteration=start, rank=rank, world=world), count))


def keys(stream_items: list[StreamItem]) -> list[str]:
    return [key for _, names, _ in stream_items for key in names]


def test_every_epoch_shows_every_row_once_in_its_own_order() -> None:
    sequence = keys(items(stream(), ROWS))
    epochs = [sequence[start : start + ROWS] for start in range(0, len(sequence), ROWS)]
    assert [sorted(map(int, epoch)) for epoch in epochs] == [list(range(ROWS))] * 5
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_keys_name_the_rows_that_are_given() -> None:
    (_, names, batch), *_ = items(stream(), 1)
    numbers = [int(name) for name in names]
    assert torch.equal(batch.x0, dit_rows(ROWS).x0[numbers])
    assert torch.equal(batch.conditions["class_labels"], dit_rows(ROWS).conditions["class_labels"][numbers])


def test_opened_later_it_goes_on_as_if_it_had_run() -> None:
    assert keys(items(stream(), 12))[35:] == keys(items(stream(), 5, start=8))
    assert [iteration for iteration, _, _ in items(stream(), 3, start=8)] == [8, 9, 10]


def test_processes_share_the_global_batch_in_order() -> None:
    halves = [items(stream(6), 4, rank=rank, world=2) for rank in (0, 1)]
    joined = [key for both in zip(*halves, strict=True) for _, names, _ in both for key in names]
    assert joined == keys(items(stream(6), 4))


def test_a_batch_may_be_larger_than_the_data() -> None:
    (_, names, _), *_ = items(stream(50), 1)
    assert len(names) == 50


def test_another_seed_has_another_order() -> None:
    assert keys(items(stream(), 4)) != keys(items(stream(seed=1), 4))


def test_no_picture_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="holds no picture"):
        MemoryStream(Batch(torch.zeros(0, 1, 8, 8), {}), global_batch=1, seed=0)


def test_a_part_cuts_every_condition() -> None:
    whole = pixart_rows(6)
    part = whole.part(slice(1, 3), torch.device("cpu"))
    assert torch.equal(part.x0, whole.x0[1:3])
    assert torch.equal(part.conditions["text"], whole.conditions["text"][1:3])
    assert part.conditions["resolution"].shape == (2, 2)


def test_dropped_rows_get_the_arguments_of_the_null_and_keep_the_others() -> None:
    rows, drop_mask = pixart_rows(3), torch.tensor([False, True, False])
    null = {
        "text": torch.full((1, 7, 32), 9.0),
        "text_mask": torch.tensor([[1.0, 1, 0, 0, 0, 0, 0]]),
    }
    result = rows.without_condition(drop_mask, null)
    assert torch.equal(result.conditions["text"][1], null["text"][0])
    assert torch.equal(result.conditions["text_mask"][1], null["text_mask"][0])
    for row in (0, 2):
        assert torch.equal(result.conditions["text"][row], rows.conditions["text"][row])
    assert result.conditions["resolution"] is rows.conditions["resolution"]
    assert torch.equal(rows.conditions["text"], pixart_rows(3).conditions["text"])
