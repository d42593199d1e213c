"""One process at a time writes into an output folder."""

import logging
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from ilf_trt.errors import InvalidRequest
from ilf_trt.train.folder_lock import locked
from ilf_trt.train.loop import Training
from tests.small_training import (
    assert_same_training,
    run_training,
    small_model,
    small_recipe,
    small_setup,
    small_stream,
)


def test_a_folder_is_held_by_one_and_free_afterwards(tmp_path: Path) -> None:
    refused = pytest.raises(InvalidRequest, match=r"another process trains in .*; wait for it, or give another")
    with locked(tmp_path, doing="trains in"), refused, locked(tmp_path, doing="trains in"):
        pass
    with locked(tmp_path, doing="trains in"):
        pass


def _hold(folder: Path, held: Any, end: Any) -> None:
    with locked(folder, doing="trains in"):
        held.set()
        end.wait(30)


def test_the_lock_of_a_killed_process_is_gone(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held, end = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path, held, end), daemon=True)
    process.start()
    assert held.wait(30)
    with pytest.raises(InvalidRequest, match="another process trains in"):
        locked(tmp_path, doing="trains in").__enter__()
    process.kill()
    process.join(30)
    with locked(tmp_path, doing="trains in"):
        pass


def test_a_second_training_in_a_folder_is_refused_and_changes_nothing(tmp_path: Path, whole: Path) -> None:
    recipe = small_recipe()
    first = Training(small_model(), recipe, small_stream(recipe), small_setup(tmp_path))
    first.resume()
    with pytest.raises(InvalidRequest, match="another process trains in"):
        run_training(tmp_path)
    first.close()
    run_training(tmp_path)
    assert_same_training(tmp_path, whole)


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    with caplog.at_level(logging.WARNING), locked(tmp_path, doing="trains in"):
        assert "cannot be locked (Operation not supported)" in caplog.text
