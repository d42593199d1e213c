"""The draws of training: a pure function of seed, iteration and row, with the right distributions."""

import pytest
import torch
from torch import Tensor

from ilf_trt.train.random_draws import VALIDATION, RandomDraws, draw_rows

LATENT = (1, 4, 4)
MANY = 4000
# Five standard errors of the mean of MANY draws: a uniform one's is 0.29 / 63, a share's at most 0.5 / 63.
MEAN_ERROR, SHARE_ERROR = 0.023, 0.04
# Five standard errors of the variance of 64,000 normal draws.
VARIANCE_ERROR = 0.03


def draws(
    rows: range = range(4), *, seed: int = 0, iteration: int = 1, dropout: float = 0.5, purpose: int = 0
) -> RandomDraws:
    return draw_rows(seed, iteration, rows, LATENT, times=1000, dropout=dropout, purpose=purpose)


def tensors(draws: RandomDraws) -> list[Tensor]:
    return [draws.time, draws.noise, draws.drop_mask, draws.share]


@pytest.fixture(scope="module")
def many() -> RandomDraws:
    return draws(range(MANY), dropout=0.1)


def test_a_row_s_draws_do_not_depend_on_how_the_batch_is_split() -> None:
    whole, parts = draws(range(10)), [draws(range(3)), draws(range(3, 10))]
    for tensor, pieces in zip(tensors(whole), zip(*map(tensors, parts), strict=True), strict=True):
        assert torch.equal(tensor, torch.cat(pieces))


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"iteration": 2}, {"purpose": VALIDATION}, {"rows": range(4, 8)}], ids=str
)
def test_other_seeds_iterations_purposes_and_rows_have_other_noise_and_times(other: dict[str, object]) -> None:
    first, second = draws(), draws(**other)  # type: ignore[arg-type]
    assert not torch.isclose(first.noise, second.noise).all((1, 2, 3)).any()
    assert not torch.equal(first.time, second.time)


def test_the_same_seed_iteration_and_rows_give_the_same_again() -> None:
    assert all(torch.equal(x, y) for x, y in zip(tensors(draws()), tensors(draws()), strict=True))


def test_a_large_seed_is_taken() -> None:
    assert not torch.equal(draws(seed=2**63 - 1).noise, draws().noise)


def test_times_are_uniform_over_the_whole_range(many: RandomDraws) -> None:
    assert (many.time.min(), many.time.max()) == (0, 999)
    assert many.time.double().mean().item() / 999 == pytest.approx(0.5, abs=MEAN_ERROR)


def test_shares_are_uniform_below_one(many: RandomDraws) -> None:
    assert 0 <= many.share.min() < 0.01 < 0.99 < many.share.max() < 1
    assert many.share.double().mean().item() == pytest.approx(0.5, abs=MEAN_ERROR)


def test_noise_is_normal_of_unit_variance(many: RandomDraws) -> None:
    assert many.noise.dtype is torch.float32
    assert many.noise.mean().item() == pytest.approx(0, abs=MEAN_ERROR)
    assert many.noise.var().item() == pytest.approx(1, abs=VARIANCE_ERROR)


def test_the_share_of_dropped_conditions_is_the_recipe_s(many: RandomDraws) -> None:
    assert many.drop_mask.float().mean().item() == pytest.approx(0.1, abs=SHARE_ERROR)
    assert not draws(range(100), dropout=0).drop_mask.any()
    assert draws(range(100), dropout=1).drop_mask.all()


def test_a_part_holds_its_rows_of_everything() -> None:
    part = draws(range(6)).part(slice(2, 4), torch.device("cpu"))
    assert all(torch.equal(x, y[2:4]) for x, y in zip(tensors(part), tensors(draws(range(6))), strict=True))
