"""The folder of one run of the tests, and what its workers make there once for all of them."""

import fcntl
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

Made = TypeVar("Made")
WORKER = "PYTEST_XDIST_WORKER"  # what pytest-xdist calls a process of a run that has several


def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The temporary folder of the whole run: a worker's own lies in it."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if WORKER in os.environ else own


def made_once(folder: Path, make: Callable[[Path], Made]) -> Made:
    """What `make` gives for `folder`, which is made by the worker that comes first; the others wait, and read it.

    The result is pickled beside the folder. A `make` that fails leaves nothing, so the next worker tries anew.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    result = folder.with_suffix(".pickle")
    with folder.with_suffix(".held").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if not result.is_file():
            made = make(folder)
            result.write_bytes(pickle.dumps(made))
        loaded: Made = pickle.loads(result.read_bytes())  # our own bytes; read back even where it was made: one result
        return loaded
