"""The comparison with the reference: what is small, what is not a number, and what is too large."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from ilf_trt.contract.bundle import REFERENCE_FILE, Bundle, write_manifest
from ilf_trt.contract.reference_cases import TRAJECTORY, cases_of
from ilf_trt.contract.spec import Precision
from ilf_trt.errors import BundleError, ParityError
from ilf_trt.runtime.verify import Difference, check, difference, table, verify

# Float32 products in another order; measured below 3e-6 over four blocks and six steps.
FLOAT32_ROUNDING = 2e-5
SMALL = Difference("pre hidden", 1e-6, 1e-7, 1.0)


@pytest.fixture(scope="module", params=["dit", "pixart"])
def verified(request: pytest.FixtureRequest) -> tuple[tuple[Difference, ...], Bundle]:
    bundle: Bundle = request.getfixturevalue(f"{request.param}_build").bundle
    differences, precision = verify(bundle.path)
    assert precision is Precision.FP32
    return differences, bundle


def test_differences_of_a_bundle_are_rounding(verified: tuple[tuple[Difference, ...], Bundle]) -> None:
    differences, _ = verified
    assert {row.what: row.relative for row in differences if not row.relative < FLOAT32_ROUNDING} == {}
    assert min(row.cosine for row in differences) == pytest.approx(1, abs=FLOAT32_ROUNDING)


def test_every_output_of_every_case_is_compared_and_the_trajectory(
    verified: tuple[tuple[Difference, ...], Bundle],
) -> None:
    differences, bundle = verified
    outputs = {graph.name: [port.name for port in graph.outputs] for graph in bundle.manifest.graphs}
    cases = cases_of(bundle.manifest.spec)
    wanted = [f"{case.graph} {case.outputs.get(name, name)}" for case in cases for name in outputs[case.graph]]
    assert [row.what for row in differences] == [*wanted, TRAJECTORY]


def test_a_difference_below_the_limit_passes() -> None:
    check((SMALL,), 1e-4)


def test_a_difference_at_the_limit_passes() -> None:
    check((SMALL,), SMALL.relative)


def test_the_first_difference_above_the_limit_is_named_with_both_numbers() -> None:
    rows = (SMALL, Difference("post prediction", 3.0, 0.5, 0.9), Difference("trajectory", 9.0, 0.9, 0.1))
    with pytest.raises(ParityError, match=r"^post prediction differs .* 5\.00e-01 .* limit is 1e-04; "):
        check(rows, 1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_difference_that_is_no_number_never_passes(value: float) -> None:
    with pytest.raises(ParityError, match="trajectory"):
        check((SMALL, Difference("trajectory", value, value, value)), 1e9)


@pytest.mark.parametrize("got", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_an_output_that_is_no_number_does_not_pass(got: float) -> None:
    row = difference("x", np.array([1.0, got], np.float32), np.array([1.0, 2.0], np.float32))
    with pytest.raises(ParityError):
        check((row,), 1e9)


def test_equal_arrays_differ_by_nothing() -> None:
    x = np.array([[1.0, -2.0], [0.5, 0.0]], np.float32)
    assert difference("x", x, x.copy()) == Difference("x", 0.0, 0.0, pytest.approx(1.0))


def test_relative_is_the_largest_difference_over_the_largest_reference() -> None:
    row = difference("x", np.array([1.0, -3.5]), np.array([1.25, -4.0]))
    assert (row.max_abs, row.relative) == (0.5, 0.125)


def test_cosine_is_of_the_flattened_arrays() -> None:
    assert difference("x", np.array([[1.0], [0.0]]), np.array([[0.0], [1.0]])).cosine == 0
    assert difference("x", np.array([1.0, 2.0]), np.array([-2.0, -4.0])).cosine == pytest.approx(-1)


def test_zeros_equal_zeros() -> None:
    assert difference("x", np.zeros(3), np.zeros(3)) == Difference("x", 0.0, 0.0, 1.0)


def test_a_value_where_zero_was_wanted_does_not_pass() -> None:
    with pytest.raises(ParityError):
        check((difference("x", np.array([0.0, 1e-3]), np.zeros(2)),), 1e-4)


def test_half_precision_is_compared_without_overflow() -> None:
    row = difference("x", np.full(8, 60_000, np.float16), np.full(8, 30_000, np.float16))
    assert (row.max_abs, row.relative) == (30_000.0, 1.0)


def test_the_table_shows_every_difference() -> None:
    console = Console(width=120, record=True, quiet=False, file=None, force_terminal=False)
    with console.capture() as captured:
        console.print(table((SMALL, Difference("trajectory", 2e-3, 4e-4, 0.9))))
    text = captured.get()
    for part in ("pre hidden", "1.00e-06", "1.00e-07", "trajectory", "2.00e-03", "4.00e-04", "0.900000000"):
        assert part in text


def copied(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy.ilf"))


def test_a_bundle_without_a_reference_is_refused_with_a_way_out(dit_bundle: Path, tmp_path: Path) -> None:
    copy = copied(dit_bundle, tmp_path)
    (copy / REFERENCE_FILE).unlink()
    write_manifest(copy, Bundle.open(dit_bundle).manifest)
    with pytest.raises(BundleError, match=r"--no-verify.*--verify"):
        verify(copy)


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04 cut short"], ids=["empty", "junk", "cut zip"])
def test_a_reference_that_is_no_npz_is_a_bundle_error(dit_bundle: Path, tmp_path: Path, content: bytes) -> None:
    copy = copied(dit_bundle, tmp_path)
    (copy / REFERENCE_FILE).write_bytes(content)
    write_manifest(copy, Bundle.open(dit_bundle).manifest)
    with pytest.raises(BundleError, match=REFERENCE_FILE):
        verify(copy)


def test_a_reference_that_lacks_a_tensor_is_a_bundle_error(dit_bundle: Path, tmp_path: Path) -> None:
    copy = copied(dit_bundle, tmp_path)
    with np.load(copy / REFERENCE_FILE) as file:
        tensors = {name: file[name] for name in file if name != "features_post"}
    np.savez(copy / REFERENCE_FILE, **tensors)
    write_manifest(copy, Bundle.open(dit_bundle).manifest)
    with pytest.raises(BundleError, match="features_post"):
        verify(copy)


def test_a_reference_of_another_shape_is_not_taken_for_a_match(dit_bundle: Path, tmp_path: Path) -> None:
    copy = copied(dit_bundle, tmp_path)
    with np.load(copy / REFERENCE_FILE) as file:
        tensors = dict(file)
    tensors[TRAJECTORY] = tensors[TRAJECTORY].transpose(0, 1, 3, 2)[..., :4]
    np.savez(copy / REFERENCE_FILE, **tensors)
    write_manifest(copy, dataclasses.replace(Bundle.open(dit_bundle).manifest))
    with pytest.raises((BundleError, ParityError)):
        check(*_limited(copy))


def _limited(copy: Path) -> tuple[tuple[Difference, ...], float]:
    differences, precision = verify(copy)
    return differences, precision.parity_limit
