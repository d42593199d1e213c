"""A whole training, which the tests of this folder share."""

import shutil
from pathlib import Path

import pytest

from tests.small_training import run_training


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted training of `small_recipe()`. Shared: copy it before you change it."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_training(folder)
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A copy of the whole training, to change."""
    return Path(shutil.copytree(whole, tmp_path / "copy", symlinks=True))
