"""The loader: order, ranks, resuming, broken samples, threads."""

import logging
import threading
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel

from ilf_trt.contract.conditioning import Conditioning
from ilf_trt.contract.ports import Role
from ilf_trt.errors import BrokenSample, DataError, InvalidRequest
from ilf_trt.model.backbones import backbone_of
from ilf_trt.train.data.loader import Loader, batch_of, is_mirrored
from ilf_trt.train.data.sample import Condition, Sample
from ilf_trt.train.shuffle import Shuffle
from tests.conftest import small_dit, small_pixart
from tests.ilf_trt.train.data.conftest import Numbers, Pull
from tests.toys import TEXT_CHANNELS as TOY_CHANNELS
from tests.toys import TEXT_TOKENS as TOY_TOKENS
from tests.toys import TwoStreams, toy_model


def loader(source: Any, **changes: Any) -> Loader:
    return Loader(source, **{"global_batch": 4, "seed": 5, **changes})


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_rows_come_in_the_seeds_order(workers: int, pull: Pull) -> None:
    batches = pull(loader(Numbers(10), workers=workers), 6)
    assert [iteration for iteration, _ in batches] == [1, 2, 3, 4, 5, 6]
    want = [f"n{row}" for row in Shuffle(10, 5).rows(0, 24)]
    assert [key for _, keys in batches for key in keys] == want


@pytest.mark.parametrize("start", [2, 3, 9])
def test_a_stream_opened_in_the_middle_of_an_epoch_goes_on_the_same(start: int, pull: Pull) -> None:
    source = Numbers(10, broken=[2, 3])
    whole = pull(loader(source), 12)
    assert pull(loader(source), 13 - start, start=start) == whole[start - 1 :]


def test_two_processes_give_the_rows_of_one(pull: Pull) -> None:
    source = Numbers(10, broken=[2, 3])
    parts = [pull(loader(source), 8, rank=rank, world=2) for rank in range(2)]
    together = [(a[0], a[1] + b[1]) for a, b in zip(*parts, strict=True)]
    assert together == pull(loader(source), 8)


def test_the_next_readable_index_takes_a_broken_ones_place(pull: Pull) -> None:
    taken = {9: 0, 0: 0, 3: 5, 4: 5}
    want = [f"n{taken.get(row, row)}" for row in Shuffle(10, 5).rows(0, 20).tolist()]
    batches = pull(loader(Numbers(10, broken=[3, 4, 9])), 5)
    assert [key for _, keys in batches for key in keys] == want


def test_every_broken_sample_is_named_once(pull: Pull, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        pull(loader(Numbers(10, broken=[3, 4])), 10)
    assert sorted(caplog.messages) == ["skipped n3: is broken", "skipped n4: is broken"]


@pytest.mark.parametrize("workers", [0, 2])
def test_more_broken_samples_than_the_limit_stop_it_at_the_same_row(workers: int, pull: Pull) -> None:
    stream = loader(Numbers(40, broken=range(0, 40, 4)), max_broken=3, workers=workers)
    batches = stream.batches(start_iteration=1, rank=0, world=1)
    rows = Shuffle(40, 5).rows(0, 40).tolist()
    fourth = [place for place, row in enumerate(rows) if row % 4 == 0][3]
    for _ in range(fourth // 4):
        next(batches)
    with pytest.raises(DataError, match=r"4 samples are broken, max_broken is 3; the last: .*\(is broken\); repair"):
        next(batches)


def test_data_of_which_nothing_can_be_read_stops_it(pull: Pull) -> None:
    with pytest.raises(DataError, match="none of the 3 samples can be read: n"):
        pull(loader(Numbers(3, broken=[0, 1, 2])), 1)
    with pytest.raises(DataError, match="3 samples are broken, max_broken is 2"):
        pull(loader(Numbers(9, broken=range(9)), max_broken=2), 1)


class Failing(Numbers):
    def read(self, index: int) -> Sample:
        if index == Shuffle(100, 5).rows(0, 100)[9]:
            raise RuntimeError("the disk is gone")
        return super().read(index)


def test_an_error_in_a_thread_comes_out_in_its_turn() -> None:
    stream = loader(Failing(100)).batches(start_iteration=1, rank=0, world=1)
    assert [next(stream)[0] for _ in range(2)] == [1, 2]
    with pytest.raises(RuntimeError, match="the disk is gone"):
        next(stream)


def test_closing_the_stream_ends_its_threads() -> None:
    stream = loader(Numbers(10), workers=3).batches(start_iteration=1, rank=0, world=1)
    next(stream)
    assert any(thread.name.startswith("ilf-data") for thread in threading.enumerate())
    stream.close()  # type: ignore[attr-defined]
    assert not any(thread.name.startswith("ilf-data") for thread in threading.enumerate())


def test_no_more_than_some_batches_are_read_ahead() -> None:
    reads = []

    class Counting(Numbers):
        def read(self, index: int) -> Sample:
            reads.append(index)
            return super().read(index)

    stream = loader(Counting(1000)).batches(start_iteration=1, rank=0, world=1)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert 4 <= len(reads) <= 5 * 4


def test_about_half_is_mirrored_by_seed_epoch_and_index() -> None:
    assert 400 < sum(is_mirrored(0, 0, index) for index in range(1000)) < 600
    assert [is_mirrored(0, 0, i) for i in range(50)] != [is_mirrored(0, 1, i) for i in range(50)]
    stream = loader(Numbers(10), flip=True, workers=0).batches(start_iteration=1, rank=0, world=1)
    for _ in range(5):
        iteration, keys, batch = next(stream)
        epochs = Shuffle(10, 5).epochs((iteration - 1) * 4, 4)
        for key, x0, epoch in zip(keys, batch.x0, epochs, strict=True):
            index = int(key[1:])
            assert x0[0, 0].tolist() == ([0.0, index] if is_mirrored(5, int(epoch), index) else [index, 0.0])


def test_labels_and_text_become_the_conditions_of_the_base() -> None:
    x0, text, mask = torch.zeros(1, 2, 2), torch.ones(3, 5), torch.tensor([1, 1, 0], dtype=torch.uint8)
    labels = batch_of([Sample("a", x0, (2, 2), label=label) for label in (3, 1)], Conditioning.of_labels(10))
    assert labels.conditions["class_labels"].tolist() == [3, 1]
    captions = [Sample("a", x0, (64, 32), text=text, text_mask=mask)] * 2
    conditions = batch_of(captions, Conditioning.of_text(3, 5, sized=True)).conditions
    assert conditions["text"].shape == (2, 3, 5)
    assert conditions["text_mask"].tolist() == [[1.0, 1.0, 0.0]] * 2
    assert conditions["resolution"].tolist() == [[64.0, 32.0]] * 2
    assert conditions["aspect_ratio"].tolist() == [[2.0]] * 2


def with_(source: Numbers, **facts: Any) -> Numbers:
    for name, value in facts.items():
        setattr(source, name, value)
    return source


def test_captions_that_are_not_embedded_say_to_prepare() -> None:
    with pytest.raises(InvalidRequest, match="ilf-trt prepare"):
        loader(with_(Numbers(3), condition=Condition.CAPTION))


def test_data_without_samples_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="holds no sample"):
        loader(Numbers(0))


NULL = {Role.TEXT: torch.zeros(1, 7, 5)}


@pytest.mark.parametrize(
    ("model", "facts", "part"),
    [
        (small_dit, {"shape": (3, 8, 8)}, r"are \(3, 8, 8\), the base takes \(1, 8, 8\)"),
        (small_dit, {"shape": (1, 8, 8), "condition": Condition.TEXT}, "takes labels"),
        (small_dit, {"shape": (1, 8, 8), "classes": 11}, "has 11 classes, the base knows 10"),
        (lambda: small_pixart(sized=False), {"shape": (4, 16, 16)}, "takes text; give captions"),
        (
            lambda: small_pixart(sized=False),
            {"shape": (4, 16, 16), "condition": Condition.TEXT, "null": NULL},
            "has 5 channels, the base takes 32",
        ),
    ],
)
def test_data_that_does_not_fit_the_base_is_refused(model: Any, facts: dict[str, Any], part: str) -> None:
    backbone: DiTTransformer2DModel | PixArtTransformer2DModel = model()
    with pytest.raises(InvalidRequest, match=part):
        loader(with_(Numbers(3), **facts)).for_base(backbone_of(backbone))


def test_a_label_beyond_the_bases_classes_is_a_broken_sample(pull: Pull) -> None:
    stream = loader(with_(Numbers(12), shape=(1, 8, 8))).for_base(backbone_of(small_dit()))
    keys = [key for _, keys in pull(stream, 3) for key in keys]
    assert not {"n10", "n11"} & set(keys)
    assert "the base has the classes 0 to 9" in stream.broken.reasons["n10"]


def test_a_broken_sample_says_key_and_reason() -> None:
    error = BrokenSample("a/1.png", "is empty")
    assert (error.key, error.reason, str(error)) == ("a/1.png", "is empty", "a/1.png: is empty")


def test_the_null_of_the_data_has_the_names_of_the_base() -> None:
    toy = TwoStreams(toy_model(TwoStreams))
    null = {Role.TEXT: torch.zeros(1, TOY_TOKENS, TOY_CHANNELS), Role.MASK: torch.ones(1, TOY_TOKENS)}
    source = with_(Numbers(3), shape=toy.latent, condition=Condition.TEXT, null=null)
    assert set(loader(source).for_base(toy).null or {}) == {"caption", "caption_is_real"}
