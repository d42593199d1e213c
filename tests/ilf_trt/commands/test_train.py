"""The command `train`: killed, stopped and resumed, two processes as one, the dry run, and refusals of one line."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ilf_trt.model.base import load_backbone
from ilf_trt.model.checkpoint import load_ilf
from ilf_trt.train.demo import new_base, new_scheduler
from tests.conftest import Run
from tests.small_training import assert_same_training, log_of
from tests.warm_process import start_command

ROOT = Path(__file__).parents[3]
TIMEOUT_S = 240.0  # a run ends within 10 s; a hang must not take the suite with it
TERMINATED, INTERRUPTED, FAILED = 143, 130, 2
ITERATIONS = 24
SMALL_COUNT = ("--set", "loss.kind=none", "--set", "model.loop=11:11")  # a dry run that counts the least
# A global sum in two halves; two steps of AdamW carry a rounding of the gradient on.
FLOAT32 = 1e-5


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's base, untrained but for its head, which would otherwise predict nothing, with its scheduler beside."""
    torch.manual_seed(0)
    folder, model = tmp_path_factory.mktemp("base"), new_base()
    for layer in (model.proj_out_1, model.proj_out_2):
        torch.nn.init.normal_(layer.weight, std=0.05)
    for block in model.transformer_blocks:
        torch.nn.init.normal_(block.norm1.linear.weight, std=0.05)
    model.save_pretrained(folder / "transformer")
    new_scheduler().save_pretrained(folder / "scheduler")
    return folder / "transformer"


def arguments(base: Path, output: Path, *more: str, iterations: int = ITERATIONS) -> list[str]:
    changes = [
        f"model.base={base}",
        f"optimisation.iterations={iterations}",
        "optimisation.batch_size=8",
        "checkpoint.every=1",
        "logging.every=1",
        "logging.samples_every=0",
    ]
    sets = [token for change in changes for token in ("--set", change)]
    return ["train", "--config", "demo", "--output", str(output), "--cpu", *sets, *more]


def wait_until(done: Callable[[], bool], process: ForkServerProcess, error_file: Path) -> None:
    """Until `done()`; fails if the process ends before, or hangs."""
    deadline = time.monotonic() + TIMEOUT_S
    while not done():
        assert process.is_alive(), error_file.read_text()
        assert time.monotonic() < deadline, f"nothing within {TIMEOUT_S} s"
        time.sleep(0.002)


def iterations(output: Path) -> list[int]:
    """The checkpoints that are there, 0 for none."""
    return [0, *(int(path.name) for path in (output / "steps").glob("[0-9]*"))]


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted training of the same command."""
    from ilf_trt.cli import main

    output = tmp_path_factory.mktemp("whole") / "out"
    assert main(arguments(base, output)) == 0
    return output


# --- killed and stopped


@pytest.mark.parametrize("seed", [0, 1])
def test_a_training_killed_at_any_moment_resumes_to_the_bit(
    base: Path, whole: Path, tmp_path: Path, run: Run, seed: int
) -> None:
    moment, output, errors = random.Random(seed), tmp_path / "out", tmp_path / "errors"
    with start_command(arguments(base, output), errors) as process:
        iteration = moment.randint(1, ITERATIONS - 10)
        wait_until(lambda: max(iterations(output)) >= iteration, process, errors)
        time.sleep(moment.uniform(0, 0.05))  # an iteration and its save take about 0.03 s
        process.kill()
        process.join(TIMEOUT_S)
        assert process.exitcode == -signal.SIGKILL
    assert not (output / "ilf.json").exists()
    assert run(*arguments(base, output, "--resume", "auto")).code == 0
    assert_same_training(output, whole)


def test_sigterm_saves_exits_143_and_resumes_to_the_bit(base: Path, whole: Path, tmp_path: Path, run: Run) -> None:
    command = arguments(base, tmp_path / "out", "--set", "checkpoint.every=1000")
    log, errors = tmp_path / "out" / "log.jsonl", tmp_path / "errors"
    with start_command(command, errors) as process:
        wait_until(lambda: log.is_file() and log.read_text().count("\n") >= 3, process, errors)
        process.terminate()
        process.join(TIMEOUT_S)
        assert process.exitcode == TERMINATED
    (saved,) = (int(path.name) for path in (tmp_path / "out" / "steps").iterdir())
    assert (
        f"stopped at iteration {saved}, saved; run the same command with --resume auto to resume" in errors.read_text()
    )
    assert 3 <= saved < ITERATIONS
    assert len(log_of(tmp_path / "out")) == saved
    assert run(*command).code == 0
    last = Path("steps") / f"{ITERATIONS:08d}"
    for name in ("ilf.safetensors", "optimizer.safetensors"):
        mine, expected = load_file(tmp_path / "out" / last / name), load_file(whole / last / name)
        assert all(torch.equal(mine[key], expected[key]) for key in expected)
    assert log_of(tmp_path / "out") == log_of(whole)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, TERMINATED), (signal.SIGINT, INTERRUPTED)])
def test_a_signal_in_this_process_saves_too_and_its_handler_is_put_back(
    base: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, sent: signal.Signals, code: int
) -> None:
    from ilf_trt.train.log import TrainingLog

    before = signal.getsignal(sent)
    write = TrainingLog.write

    def writes(log: TrainingLog, iteration: int, facts: dict[str, object]) -> None:
        write(log, iteration, facts)
        if iteration == 2:
            os.kill(os.getpid(), sent)

    monkeypatch.setattr(TrainingLog, "write", writes)
    result = run(*arguments(base, tmp_path / "out"))
    assert (result.code, result.out) == (code, "")
    assert "stopped at iteration 3, saved" in result.err  # the loop hears a signal of iteration 2 after the next one
    assert signal.getsignal(sent) is before


# --- two processes


def test_two_processes_by_accelerate_launch_have_the_losses_of_one(base: Path, tmp_path: Path, run: Run) -> None:
    changes = ("optimisation.accumulate=2", "checkpoint.metric=validation", "checkpoint.every=3")
    more = tuple(token for change in changes for token in ("--set", change))
    launch = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")  # with --cpu it starts but one
    two = arguments(base, tmp_path / "two", *more, iterations=6)
    done = subprocess.run(
        [sys.executable, "-m", *launch, "-m", "ilf_trt", *two],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1
    assert run(*arguments(base, tmp_path / "one", *more, iterations=6)).code == 0
    one_log, two_log = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert [line["processes"] for line in two_log] == [2] * 6
    for name in ("loss", "reconstruction", "distillation", "grad_norm"):
        one, both = ([line[name] for line in log] for log in (one_log, two_log))
        assert both == pytest.approx(one, rel=FLOAT32)
    states = [json.loads((tmp_path / n / "steps" / "00000006" / "state.json").read_text()) for n in ("one", "two")]
    assert states[1]["standing"]["best"] == pytest.approx(states[0]["standing"]["best"], rel=FLOAT32)


# --- what comes out


def test_the_output_is_a_checkpoint_that_loads_with_its_base(whole: Path, base: Path) -> None:
    model = load_ilf(whole)
    assert model.feedback.scales.abs().min() > 0
    expected = load_backbone(str(base)).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.backbone.state_dict().items())


def test_the_next_command_is_told(base: Path, tmp_path: Path, run: Run) -> None:
    result = run(*arguments(base, tmp_path / "out", iterations=1))
    assert (
        result.out.splitlines()[1] == f"next: ilf-trt build --checkpoint {tmp_path / 'out'} -o {tmp_path / 'out'}.ilf"
    )


def test_the_demo_s_recipe_writes_sample_grids(base: Path, tmp_path: Path, run: Run) -> None:
    more = ("--set", "logging.samples_every=1", "--set", "logging.steps=2", "--set", "logging.labels=3,5-6")
    assert run(*arguments(base, tmp_path / "out", *more, iterations=1)).code == 0
    assert [path.name for path in (tmp_path / "out" / "samples").iterdir()] == ["00000001.png"]


# --- the dry run


def test_a_dry_run_prints_memory_flop_steps_and_hours_and_writes_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("train", "--config", "cifar10", "--dry-run", "--rate", "100", "--processes", "2")
    assert result.code == 0
    parts = ("35.2 M frozen, 2.9 M trained", "a checkpoint on disk", "128 = 2 x 1 x 64", "5000", "hours at 100 TFLOP/s")
    assert [part for part in parts if part not in result.out] == []
    assert list(tmp_path.iterdir()) == []


def test_hours_go_with_the_rate(run: Run) -> None:
    hours = []
    for rate in (1, 2):
        lines = run("train", "--config", "demo", *SMALL_COUNT, "--dry-run", "--rate", rate).out.splitlines()
        (line,) = (line for line in lines if "hours" in line)
        hours.append(float(line.split()[-1]))
    assert hours[0] == pytest.approx(2 * hours[1], rel=0.01)  # three digits are printed


def test_a_dry_run_takes_the_config_of_a_base_on_the_disk(run: Run, base: Path) -> None:
    for folder in (base, base.parent):
        result = run("train", "--config", "demo", "--set", f"model.base={folder}", *SMALL_COUNT, "--dry-run")
        assert "1.2 M frozen" in result.out


def test_a_dry_run_without_base_or_config_is_refused(run: Run) -> None:
    result = run("train", "--config", "demo", "--set", "model.base=none/of-these", "--dry-run")
    result.refused("none/of-these is no folder here", "model.kind")


@pytest.mark.parametrize("option", [("--rate", "0"), ("--processes", "0")])
def test_a_dry_run_on_nothing_is_refused(run: Run, option: tuple[str, str]) -> None:
    run("train", "--config", "demo", "--dry-run", *option).refused("must be above 0")


# --- refusals


@pytest.mark.parametrize(
    ("tokens", "parts"),
    [
        (("--config", "demo"), ("--output is missing",)),
        (("--config", "dmeo", "-o", "x"), ("did you mean demo?",)),
        (("--config", "demo", "-o", "x", "--set", "loss.knd=fast"), ("loss.knd is unknown; did you mean kind?",)),
        (("--config", "demo", "-o", "x", "--set", "model.base=/none"), ("base /none is not a folder", "model.base")),
        (("--config", "demo", "-o", "x", "--set", "model.loop=3:12"), ("loop",)),
        (("--config", "demo", "-o", "x", "--set", "logging.labels=0-10"), ("classes 0 to 9",)),
        (("--config", "demo", "-o", "x", "--set", "data.pth=y"), ("data.pth is unknown",)),
        (("--config", "demo", "-o", "x", "--set", "model.config={num_layers=4}"), ("model.config.num_layers is 4",)),
        (("--config", "demo", "-o", "x", "--resume", "nowhere"), ("--resume nowhere", "state.json")),
        (("--config", "demo", "-o", "x", "--cpu", "--set", "optimisation.accumulate=3"), ("batch_size is 128",)),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else None,
)
def test_it_is_refused_in_one_line_and_nothing_is_written(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    run("train", *tokens).refused(*parts)
    assert list(tmp_path.iterdir()) == []


def test_a_second_training_into_the_same_folder_is_refused_by_none(run: Run, base: Path, whole: Path) -> None:
    run(*arguments(base, whole, "--resume", "none")).refused("holds a training up to iteration 24", "--resume auto")
