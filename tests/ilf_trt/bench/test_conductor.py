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
from ilf_trt.bench.row import Boundary, Rival
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
            return {"host_ms": TIMES_MS.get(fields["slug"], 15.0) * next(made.jitter), "device_ms": None}

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
    more = {name: options.pop(name) for name in ("write", "earlier", "show") if name in options}
    return Conductor(BenchOptions(bundle=bundle, **options), "ilf-trt bench", **more).run()


def against_eager(bundle: Path, **options: Any) -> Result:
    return run(bundle, checkpoint="CKPT", against=(Rival.EAGER,), within=0.05, **options)


def test_rows_take_turns_after_their_warm_ups(dit_bundle: Path, stage: Stage) -> None:
    result = against_eager(dit_bundle)
    shots, rows = stage.shots(), list(TIMES_MS)
    warm_ups = [slug for slug in rows for _ in range(WARM_UPS)]
    assert shots[: len(warm_ups)] == warm_ups
    assert shots[len(warm_ups) :] == rows * LEAST_TURNS
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


@pytest.mark.parametrize("do", ["open", "shoot", "latents"])
@pytest.mark.parametrize("slug", ["eager", "ilf"])
def test_a_row_that_fails_is_a_row_with_its_reason(slug: str, do: str, dit_bundle: Path, stage: Stage) -> None:
    stage.broken[slug, do] = EngineError("no kernel for this")
    result = against_eager(dit_bundle)
    broken = result.row(slug, 1)
    assert broken is not None
    assert (broken.failed, broken.host, broken.ratio) == ("no kernel for this", None, None)
    others = [row for row in result.rows if row.slug != slug]
    assert all(row.failed == "" and row.host is not None for row in others)
    assert result.base_line == ("eager-equal" if slug == "eager" else "eager")
    assert result.row("eager-ilf", 1).ratio is not None  # type: ignore[union-attr]


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
    result = against_eager(dit_bundle, earlier=(*whole, *torn), write=written.append)
    assert all(row.host is not None and row.host.n == LEAST_TURNS for row in result.rows)
    assert {one.turn for one in written if one.counts} == set(range(3, LEAST_TURNS))
    assert all(row.host is not None and row.host.least_ms > 1 for row in result.rows)


def test_every_sample_is_written_and_warm_ups_are_marked(dit_bundle: Path, stage: Stage) -> None:
    written: list[Observation] = []
    against_eager(dit_bundle, write=written.append)
    assert [one.row for one in written] == stage.shots()
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
