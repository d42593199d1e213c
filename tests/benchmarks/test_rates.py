"""The rates of a block's kernels without a GPU: the dry run, and that the models' own kernels are what is measured."""

import csv
from pathlib import Path

import pytest
import torch

from benchmarks.record import RESULTS
from benchmarks.rivals.full_size_models import MODELS
from benchmarks.speed import machine, rates
from benchmarks.speed.block_work import GUIDED_ROWS, trace_block
from benchmarks.speed.machine import Machine
from benchmarks.speed.roofline_rates import FP8, FP16, PADDED, PADDED_LESS


class UnusedGpu(Machine):
    """A machine that has no GPU, for names and sizes alone."""

    def __init__(self) -> None:
        self.dry_run, self.device, self.gpu = False, "cuda:0", "NVIDIA H200"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "SAMPLES", 2)
    monkeypatch.setattr(machine, "SAMPLE_MS", 0.1)


@pytest.fixture
def rows(quick: None, tmp_path: Path) -> list[dict[str, str]]:
    """The rows of a dry run."""
    before = {path: path.read_bytes() for path in RESULTS.rglob("*") if path.is_file()}
    assert rates.main(["--dry-run", "--output", str(tmp_path), "--commit", "abc"]) == 0
    assert {path: path.read_bytes() for path in RESULTS.rglob("*") if path.is_file()} == before
    with (tmp_path / "gpu-rates.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_rate_has_a_number_or_a_reason(rows: list[dict[str, str]]) -> None:
    assert {row["what"] for row in rows} == {
        *("linear fp16", "linear fp8", "attention fp8 default"),
        *(f"attention fp16 {backend}" for backend in ("default", "flash", "cudnn")),
    }
    for row in rows:
        assert bool(row["note"]) != bool(row["median"]), row
        assert not row["median"] or 0 < float(row["median"]) <= float(row["best"])
        assert row["unit"] == "TFLOP/s"
    assert any(row["median"] for row in rows if row["what"] == "linear fp16")


def test_a_dry_run_says_that_it_measures_no_gpu(rows: list[dict[str, str]]) -> None:
    assert {row["gpu"] for row in rows} == {"none, a dry run on the CPU"}
    assert all(row["device"].startswith("no GPU, ") and row["commit"] == "abc" for row in rows)


def test_rows_after_the_budget_say_so(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "BUDGET_S", -1.0)
    assert rates.main(["--dry-run", "--output", str(tmp_path)]) == 0
    with (tmp_path / "gpu-rates.csv").open(newline="") as file:
        assert {(row["median"], row["note"]) for row in csv.DictReader(file)} == {("", "left out after -1 s")}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs no GPU")
def test_without_a_gpu_it_is_refused_unless_it_is_a_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert rates.main([]) == 2
    assert "pass --dry-run" in capsys.readouterr().err


def test_the_call_runs_the_next_kernels_of_its_iterator() -> None:
    ran: list[int] = []
    call = rates._captured(Machine(dry_run=True), 3, lambda: (lambda n=n: ran.append(n) for n in range(9)))()
    call()
    call()
    assert ran == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("name", MODELS)
def test_every_large_kernel_of_a_block_is_measured(name: str) -> None:
    measured = {(what, size) for what, size, _, _ in rates._rates(UnusedGpu())}
    work = trace_block(name)
    for product in (*work.products, *work.engine_products):
        if product.rows > GUIDED_ROWS:
            size = rates.product_size(product.rows, product.inputs, product.outputs)
            assert {("linear fp16", size), ("linear fp8", size)} <= measured
    for product in work.filled.engine_products:
        assert ("linear fp8", rates.product_size(product.rows, product.inputs, product.outputs)) in measured
    for each in work.attentions:
        eager = rates.attention_size(each.queries, each.keys, each.head_size, masked=each.masked)
        assert (rates.attention_name(FP16, rates.DEFAULT), eager) in measured
        for padded in () if each.masked else (PADDED, PADDED_LESS):
            size = rates.attention_size(each.queries, each.keys, padded)
            for precision in (FP16, FP8):
                assert (rates.attention_name(precision, rates.DEFAULT), size) in measured
