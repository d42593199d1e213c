"""The two processes of a benchmark, started for real: what they load, give and refuse."""

import json
import sys
from pathlib import Path

import pytest

from ilf_trt.bench.conductor import RUNTIME
from ilf_trt.bench.load_result import read_load
from ilf_trt.bench.observation import Observation
from ilf_trt.bench.observation_log import read_observations
from ilf_trt.bench.results_folder import ResultsFolder
from ilf_trt.bench.runtime_process import FORBIDDEN, NoTorch
from ilf_trt.bench.torch_process import TorchProcess
from ilf_trt.bench.worker import Worker
from ilf_trt.contract.bundle import Bundle
from ilf_trt.errors import EngineError, InvalidRequest
from tests.conftest import Run

FILES = {"observations.jsonl", "result.json", "environment.json", "report.html", "report.md", "asked.json"}


def test_the_command_measures_both_sides_and_writes_a_folder(
    run: Run, dit_bundle: Path, dit_checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "results"
    asked = ("bench", dit_bundle, "--threads", 1, "-o", folder, "--labels", "1,2", "--steps", 4, "--ilf-steps", 3)
    against = ("--against", "eager", "--checkpoint", dit_checkpoint)
    ran = run(*asked, *against, "--max-seconds", 0.01)
    assert ran.code == 0, ran.err
    assert "verdict: comparable" in ran.out
    assert {path.name for path in folder.iterdir()} == FILES
    result = json.loads((folder / "result.json").read_text())
    rows = {row["slug"]: row for row in result["rows"]}
    assert list(rows) == ["eager", "eager-equal", "eager-ilf", "plain", "equal", "ilf"]
    assert all(rows[slug]["agreement"]["own_plan_db"] > 80 for slug in ("plain", "equal", "ilf"))
    assert rows["ilf"]["agreement"]["plain_db"] < rows["plain"]["agreement"]["plain_db"]
    assert {"cond", "pre", "loop_body", "loop_feedback", "post", "host"} == set(result["ilf_ms"])

    again = run(*asked, *against)
    assert (again.code, "pass --resume" in again.err) == (2, True)
    other = run(*asked, "--resume")
    assert (other.code, "another against, checkpoint" in other.err) == (2, True)
    compared = run("bench", "--compare", folder, folder)
    assert (compared.code, "no difference seen" in compared.out) == (0, True)


def test_an_interrupted_folder_goes_on_behind_its_whole_lines(tmp_path: Path) -> None:
    place, asked = tmp_path / "results", {"bundle": "a", "steps": 20}
    samples = [Observation("plain", 1, turn, 0.5, 20.0) for turn in range(-1, 3)]
    folder = ResultsFolder(place, asked, resume=False)
    for one in samples:
        folder.write(one)
    folder.close()
    with (place / "observations.jsonl").open("ab") as file:
        file.write(b'{"row": "plain", "ba')
    gone_on = ResultsFolder(place, asked, resume=True)
    assert gone_on.earlier == tuple(samples)
    gone_on.begin(samples[1:3])
    gone_on.write(samples[0])
    gone_on.close()
    assert read_observations(place / "observations.jsonl") == (*samples[1:3], samples[0])
    with pytest.raises(InvalidRequest, match="with another steps; measure into another -o FOLDER"):
        ResultsFolder(place, {**asked, "steps": 10}, resume=True)


def test_a_folder_without_a_sample_is_no_result(tmp_path: Path) -> None:
    ResultsFolder(tmp_path / "results", {"batches": [1000]}, resume=False).close()
    ResultsFolder(tmp_path / "results", {"batches": [1]}, resume=False).close()


def test_the_process_that_serves_cannot_load_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [NoTorch(), *sys.meta_path])
    for name in FORBIDDEN:
        monkeypatch.delitem(sys.modules, name, raising=False)
        with pytest.raises(ImportError, match="measures serving without PyTorch"):
            __import__(name)


def test_a_process_gives_its_errors_and_says_how_it_died(dit_bundle: Path) -> None:
    with Worker(RUNTIME) as worker:
        assert worker.facts == {"torch": False}
        load = {"device": "cpu", "engine": None, "threads": 1, "steps": 2, "ilf_steps": 2, "feedback": None}
        with pytest.raises(InvalidRequest, match=r"STEPS|steps|0"):
            worker.ask("load", bundle=str(dit_bundle), front=[], **{**load, "steps": 0})
        worker.ask("load", bundle=str(dit_bundle), front=["3:all"], **load)
        worker._process.kill()
        with pytest.raises(EngineError, match="was ended by signal 9, perhaps because memory ran out"):
            worker.ask("memory")


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"base_sha256": "0" * 64}, "the bundle was built from 000000000000; pass the checkpoint that the bundle was"),
        (
            {"scales": [9.0]},
            "has another feedback block than the bundle; pass the checkpoint that the bundle was built",
        ),
        ({"device": "cuda:0"}, "torch sees no GPU for --device cuda:0"),
    ],
)
def test_what_is_not_the_bundles_or_not_here_is_refused(
    facts: dict[str, object], words: str, dit_bundle: Path, dit_checkpoint: Path
) -> None:
    manifest = Bundle.open(dit_bundle).manifest
    asked = {
        "checkpoint": str(dit_checkpoint),
        "bundle": str(dit_bundle),
        "device": "cpu",
        "precision": "fp32",
        "guidance": True,
        "guidance_scale": 1.5,
        "scheduler": manifest.scheduler,
        "base_sha256": manifest.base_sha256,
        "scales": list(manifest.scales),
        "threads": 1,
    }
    with pytest.raises(InvalidRequest, match=words):
        TorchProcess().load({**asked, **facts})
    assert TorchProcess().load(asked)["library"].startswith("torch ")


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ((), "bench needs a bundle, or --compare A B"),
        (("missing.ilf",), "missing.ilf"),
        (("BUNDLE", "--rate", "0", "--max-seconds", "1"), "--rate is 0"),
        (("BUNDLE", "--clients", "0"), "--clients is 0"),
        (("BUNDLE", "--requests", "5"), "pass --clients or --rate too"),
        (("BUNDLE", "--against", "fast"), "--against names 'fast'"),
        (("BUNDLE", "--against", "eager"), "--checkpoint CKPT"),
        (("BUNDLE", "--within", "wide"), "--within is 'wide'"),
        (("BUNDLE", "--resume"), "pass -o FOLDER too"),
        (("BUNDLE", "--clients", "1", "--plans", "3:all"), "--plans is about rows in turns"),
        (("BUNDLE", "--clients", "1", "--batch", "1,2"), "more than one --batch is about rows in turns"),
        (("--compare", "a", "b"), "no result of ilf-trt bench"),
    ],
)
def test_what_cannot_be_measured_is_one_line_and_exit_code_two(
    tokens: tuple[str, ...], words: str, run: Run, dit_bundle: Path
) -> None:
    ran = run("bench", *(str(dit_bundle) if token == "BUNDLE" else token for token in tokens))
    assert ran.code == 2
    assert words in ran.err
    assert ran.err.count("\n") == 1


def test_a_stream_of_requests_is_answered_in_process(run: Run, dit_bundle: Path, tmp_path: Path) -> None:
    asked = ("bench", dit_bundle, "--clients", 2, "--requests", 6, "--threads", 1, "--ilf-steps", 2, "-o", tmp_path)
    ran = run(*asked)
    assert ran.code == 0, ran.err
    assert "6 of 6 requests answered" in ran.out
    assert read_load(tmp_path / "load.json").answered == 6
