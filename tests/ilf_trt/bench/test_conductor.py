"""A benchmark conducted: rows take turns, a broken row is a row, and an interrupted run goes on. No row is timed."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ilf_trt.bench import conductor
from ilf_trt.bench.conductor import RUNTIME, TORCH, WARM_UPS, Conductor
from ilf_trt.bench.inputs import write_latents
from ilf_trt.bench.observation import Observation
from ilf_trt.bench.options import BenchOptions
from ilf_trt.bench.result import Result
from ilf_trt.bench.row import Boundary, Rival, Side
from ilf_trt.bench.statistics import LEAST_TURNS
from ilf_trt.contract.bundle import Bundle
from ilf_trt.errors import EngineError, IlfError, InvalidRequest
from ilf_trt.runtime.request import changed_plan

TIMES_MS = {"eager": 80.0, "eager-equal": 48.0, "eager-ilf": 46.0, "plain": 20.0, "equal": 12.0, "ilf": 11.0}
SHAPE = (1, 4, 8, 8)


class Stage:
    """The processes of a benchmark, played: `asked` is every request in order, `broken` where a row fails."""

    def __init__(self, bundle: Path) -> None:
        self.manifest = Bundle.open(bundle).manifest
        self.asked: list[tuple[str, str, dict[str, Any]]] = []
        self.broken: dict[tuple[str, str], IlfError] = {}
        self.dead_from: tuple[str, int] | None = None
        """The process that dies, and behind how many shots of all rows."""
        self.device_ms: float | None = None
        self.jitter = itertools.cycle([0.99, 1.0, 1.01])

    def shots(self) -> list[str]:
        return [fields["slug"] for _, do, fields in self.asked if do == "shoot"]


@pytest.fixture
def stage(dit_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    made = Stage(dit_bundle)

    class Played:
        process_s = 0.5

        def __init__(self, module: str, *, threads: int = 0) -> None:
            self.module = module

        def ask(self, do: str, /, **fields: Any) -> dict[str, Any]:
            made.asked.append((self.module, do, fields))
            broken = made.broken.get((fields.get("slug", ""), do))
            if broken is not None:
                raise broken
            if (
                made.dead_from is not None
                and self.module == made.dead_from[0]
                and len(made.shots()) > made.dead_from[1]
            ):
                raise EngineError(f"the process {self.module} was ended by signal 9")
            return getattr(self, f"_{do}")(fields)  # type: ignore[no-any-return]

        def _load(self, fields: dict[str, Any]) -> dict[str, Any]:
            if self.module == TORCH:
                return {"load_s": 2.0, "library": "torch"}
            plans = {
                "plain": changed_plan(made.manifest, fields["steps"], feedback="none"),
                "equal": changed_plan(made.manifest, 12, feedback="none"),
                "ilf": changed_plan(made.manifest, 10),
            }
            front = [changed_plan(made.manifest, int(text.split(":")[0]), feedback="none") for text in fields["front"]]
            return {
                "plans": {name: plan.as_json() for name, plan in plans.items()},
                "front": [plan.as_json() for plan in front],
                "device": "CPU, played",
                "load_s": 0.1,
            }

        def _open(self, fields: dict[str, Any]) -> dict[str, Any]:
            return {"load_s": 0.1, "first_s": 0.2}

        def _shoot(self, fields: dict[str, Any]) -> dict[str, Any]:
            return {"host_ms": TIMES_MS.get(fields["slug"], 15.0) * next(made.jitter), "device_ms": made.device_ms}

        def _latents(self, fields: dict[str, Any]) -> dict[str, Any]:
            write_latents(Path(fields["path"]), np.full(SHAPE, 1.5, np.float32))
            return {}

        def _reference(self, fields: dict[str, Any]) -> dict[str, Any]:
            write_latents(Path(fields["path"]), np.linspace(0, 2, np.prod(SHAPE), dtype=np.float32).reshape(SHAPE))
            return {}

        def _inputs(self, fields: dict[str, Any]) -> dict[str, Any]:
            return {}

        def _pixels(self, fields: dict[str, Any]) -> dict[str, Any]:
            return {"pixels": False}

        def _memory(self, fields: dict[str, Any]) -> dict[str, Any]:
            return {"peak_mib": 100.0}

        def _profile(self, fields: dict[str, Any]) -> dict[str, Any]:
            return {"pre": 2.0, "loop_body": 6.0, "host": 1.0}

        def close(self) -> None:
            made.asked.append((self.module, "close", {}))

        def __enter__(self) -> "Played":
            return self

        def __exit__(self, *error: object) -> None:
            self.close()

    monkeypatch.setattr(conductor, "Worker", Played)
    monkeypatch.setattr(conductor, "SETTLE_S", 0.0)
    return made


def run(bundle: Path, **options: Any) -> Result:
    more = {name: options.pop(name) for name in ("begin", "write", "earlier", "stop") if name in options}
    return Conductor(BenchOptions(bundle=bundle, **options), "ilf-trt bench", **more).run()


def against_eager(bundle: Path, **options: Any) -> Result:
    return run(bundle, checkpoint="CKPT", against=(Rival.EAGER,), within=0.05, **options)


def test_rows_take_turns_after_their_warm_ups(dit_bundle: Path, stage: Stage) -> None:
    result = against_eager(dit_bundle)
    shots, rows = stage.shots(), list(TIMES_MS)
    awake = [*TIMES_MS]
    for first in ("plain", "eager"):  # one more run where the process changes, which counts nowhere
        awake.insert(awake.index(first), first)
    assert len(shots) == (WARM_UPS + LEAST_TURNS) * len(rows) + 2 + 2 * LEAST_TURNS
    assert shots[-len(awake) * LEAST_TURNS :] == awake * LEAST_TURNS
    assert [row.slug for row in result.rows] == rows
    assert all(row.host is not None and row.host.n == LEAST_TURNS for row in result.rows)
    assert result.base_line == "eager"
    assert result.finished


def test_ratios_are_to_the_first_row_and_ilf_stands_beside_equal_cost(dit_bundle: Path, stage: Stage) -> None:
    result = against_eager(dit_bundle)
    ratios = {row.slug: row.ratio.median for row in result.rows if row.ratio is not None}
    assert ratios == pytest.approx({slug: 80 / ms for slug, ms in TIMES_MS.items() if slug != "eager"}, rel=0.03)
    assert [row.slug for row in result.rows][-2:] == ["equal", "ilf"]
    assert result.ilf_ms == {"pre": 2.0, "loop_body": 6.0, "host": 1.0}


def test_engines_alone_start_no_torch(dit_bundle: Path, stage: Stage) -> None:
    result = run(dit_bundle)
    assert {module for module, _, _ in stage.asked} == {RUNTIME}
    assert result.base_line == "plain"
    assert [row.slug for row in result.rows] == ["plain", "equal", "ilf"]
    assert all(row.agreement is not None and row.agreement.own_plan_db is None for row in result.rows)


@pytest.mark.parametrize("do", ["open", "shoot"])
@pytest.mark.parametrize("slug", ["eager", "ilf"])
def test_a_row_that_fails_is_a_row_with_its_reason(slug: str, do: str, dit_bundle: Path, stage: Stage) -> None:
    stage.broken[slug, do] = EngineError("no kernel for this")
    result = against_eager(dit_bundle)
    broken = result.row(slug, 1)
    assert broken is not None
    numbers = (broken.host, broken.ratio, broken.cold, broken.peak_mib, broken.agreement)
    assert (broken.failed, numbers) == ("no kernel for this", (None,) * 5)
    others = [row for row in result.rows if row.slug != slug]
    assert all(row.failed == "" and row.host is not None for row in others)
    assert result.base_line == ("eager-equal" if slug == "eager" else "eager")
    assert result.row("eager-ilf", 1).ratio is not None  # type: ignore[union-attr]


@pytest.mark.parametrize(("slug", "do"), [("eager", "latents"), ("", "reference"), ("", "memory"), ("ilf", "profile")])
def test_what_fails_behind_the_turns_costs_no_row_its_times(
    slug: str, do: str, dit_bundle: Path, stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    stage.broken[slug, do] = EngineError("CUDA out of memory")
    result = against_eager(dit_bundle)
    assert result.base_line == "eager"
    assert all(row.failed == "" and row.host is not None for row in result.rows)
    agreements = [row.agreement is not None and row.agreement.own_plan_db is not None for row in result.rows]
    assert agreements == [do != "reference" and (slug, do) != ("eager", "latents"), *[do != "reference"] * 5]
    assert (result.ilf_ms == {}) == (do == "profile")


def test_a_process_that_dies_fails_its_rows_and_the_others_go_on(dit_bundle: Path, stage: Stage) -> None:
    warm_ups = WARM_UPS * len(TIMES_MS)
    stage.dead_from = (TORCH, warm_ups + 2 * len(TIMES_MS))
    result = against_eager(dit_bundle, batches=(1, 2))
    assert {row.failed for row in result.rows if row.side is Side.TORCH} == {
        "the process ilf_trt.bench.torch_process was ended by signal 9"
    }
    engines = [row for row in result.rows if row.side is Side.RUNTIME]
    assert [(row.slug, row.batch) for row in engines] == [
        (slug, n) for n in (1, 2) for slug in ("plain", "equal", "ilf")
    ]
    assert all(row.host is not None and row.failed == "" for row in engines)


def test_a_stop_ends_behind_the_row_and_says_so(dit_bundle: Path, stage: Stage) -> None:
    wanted = WARM_UPS * len(TIMES_MS) + 2 * len(TIMES_MS)
    result = against_eager(dit_bundle, batches=(1, 2), stop=lambda: len(stage.shots()) >= wanted)
    assert not result.finished
    assert {(row.batch, row.host.n if row.host else 0) for row in result.rows} == {(1, 2)}
    assert not [do for _, do, _ in stage.asked if do in ("latents", "reference", "profile")]


def test_processes_end_when_one_of_them_cannot_load(dit_bundle: Path, stage: Stage) -> None:
    stage.broken["", "load"] = InvalidRequest("another base")
    with pytest.raises(InvalidRequest, match="another base"):
        against_eager(dit_bundle)
    assert [do for _, do, _ in stage.asked][-1] == "close"


def test_an_interrupted_run_goes_on_behind_its_last_whole_turn(dit_bundle: Path, stage: Stage) -> None:
    rows = list(TIMES_MS)
    whole = [Observation(slug, 1, turn, 0.0, TIMES_MS[slug]) for turn in range(3) for slug in rows]
    torn = [Observation(slug, 1, 3, 0.0, 1.0) for slug in rows[:2]]
    written: list[Observation] = []
    kept: list[Observation] = []
    result = against_eager(dit_bundle, earlier=(*whole, *torn, *whole), write=written.append, begin=kept.extend)
    assert sorted(kept, key=lambda one: (one.turn, rows.index(one.row))) == whole
    assert all(row.host is not None and row.host.n == LEAST_TURNS for row in result.rows)
    assert {one.turn for one in written if one.counts} == set(range(3, LEAST_TURNS))
    assert all(row.host is not None and row.host.least_ms > 1 for row in result.rows)


def test_a_row_that_failed_before_begins_behind_the_turns_of_the_others(dit_bundle: Path, stage: Stage) -> None:
    whole = [Observation(slug, 1, turn, 0.0, TIMES_MS[slug]) for turn in range(3) for slug in TIMES_MS if slug != "ilf"]
    result = against_eager(dit_bundle, earlier=whole)
    turns = {row.slug: row.host.n for row in result.rows if row.host is not None}
    assert turns == {slug: LEAST_TURNS - 3 * (slug == "ilf") for slug in TIMES_MS}


def test_end_to_end_compares_the_hosts_times(dit_bundle: Path, stage: Stage) -> None:
    stage.device_ms = 3.0
    assert all(row.device is not None for row in against_eager(dit_bundle).rows)
    whole = against_eager(dit_bundle, boundary=Boundary.END_TO_END)
    assert all(row.device is None for row in whole.rows)


def test_every_sample_is_written_and_warm_ups_are_marked(dit_bundle: Path, stage: Stage) -> None:
    written: list[Observation] = []
    against_eager(dit_bundle, write=written.append)
    shots = stage.shots()
    assert [one.row for one in written if one.counts][-len(TIMES_MS) :] == list(TIMES_MS)
    assert len(shots) - len(written) == 2 + 2 * LEAST_TURNS  # where the process changes
    assert sum(not one.counts for one in written) == WARM_UPS * len(TIMES_MS)


def test_batches_and_pictures_for_quality_have_inputs_of_their_own(dit_bundle: Path, stage: Stage) -> None:
    result = against_eager(dit_bundle, batches=(1, 4), quality_pictures=3)
    asked = [
        (fields["batch"], fields["seed"]) for module, do, fields in stage.asked if (module, do) == (RUNTIME, "inputs")
    ]
    assert asked == [(1, 0), (1, 1), (1, 2), (4, 0)]
    kept = [fields["keep"] for module, do, fields in stage.asked if (module, do) == (TORCH, "inputs")]
    assert kept == [False, True, True, False]
    assert {(row.slug, row.batch) for row in result.rows} == {(slug, batch) for slug in TIMES_MS for batch in (1, 4)}


def test_the_two_sides_are_comparable_only_in_one_precision_and_boundary(dit_bundle: Path, stage: Stage) -> None:
    assert against_eager(dit_bundle).verdict.comparable
    verdict = against_eager(dit_bundle, torch_precision="bf16").verdict
    assert not verdict.comparable
    assert verdict.differs == ("precision: the engines run in fp32, PyTorch in bf16",)
    assert against_eager(dit_bundle, boundary=Boundary.END_TO_END).verdict.comparable  # no text encoder, no decoder


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"against": (Rival.EAGER,)}, "pass it: --checkpoint CKPT"),
        ({"device": "cuda:x"}, "device 'cuda:x' is unknown; it is cpu, cuda or cuda:N"),
        ({"batches": ()}, "--batch is empty"),
        ({"batches": (1, 1)}, "give each number once"),
        ({"batches": (0,)}, "--batch is 0"),
        ({"within": 0.0}, "--within is 0"),
        ({"max_s": float("inf")}, "--max-seconds is inf"),
        ({"plans": ("ten:none",)}, "--plans names 'ten:none'"),
        ({"quality_pictures": -1}, "--quality-pictures is -1"),
        ({"prompts": ("a",), "labels": (1,)}, "--prompt and --labels are both given"),
    ],
)
def test_options_that_cannot_be_measured_are_refused_at_once(
    options: dict[str, Any], words: str, dit_bundle: Path, stage: Stage
) -> None:
    with pytest.raises(InvalidRequest, match=words):
        run(dit_bundle, **options)
    assert stage.asked == []


def test_rivals_have_one_name_and_eager_is_always_among_them() -> None:
    assert Rival.parse_all("compile, eager") == (Rival.EAGER, Rival.COMPILE)
    assert Rival.parse_all("onnx") == (Rival.EAGER, Rival.ONNX)
    with pytest.raises(InvalidRequest, match="--against names 'fast', it takes eager, compile"):
        Rival.parse_all("eager,fast")
