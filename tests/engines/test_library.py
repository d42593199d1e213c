"""The real TensorRT-RTX, asked what it can build for; TensorRT's side is in test_tensorrt.py."""

import os
import tomllib
from pathlib import Path

import pytest

from ilf_trt.contract.target import Architecture, Library
from ilf_trt.engines.job import ask
from ilf_trt.engines.library import VERSIONS, LibraryFacts
from ilf_trt.errors import MissingDependency

ROOT = Path(__file__).parents[2]
NEEDED = [Architecture(8, 0), Architecture(8, 6), Architecture(8, 9), Architecture(12, 0)]


def probe() -> LibraryFacts:
    return LibraryFacts.from_json(ask(Library.TENSORRT_RTX, {"do": "probe", "library": "tensorrt-rtx"}))


def test_it_builds_for_the_cards_that_the_documents_name_and_needs_none() -> None:
    facts = probe()
    assert set(NEEDED) <= set(facts.gpus)
    assert list(facts.gpus) == sorted(facts.gpus)
    assert (facts.gpu_name, facts.driver) == ("", "")


def test_hopper_is_not_among_them() -> None:
    assert Architecture(9, 0) not in probe().gpus


def test_facts_come_back_from_json_unchanged() -> None:
    facts = LibraryFacts("11.4", (Architecture(9, 0), Architecture(12, 0)), "NVIDIA H100", "580.65.6")
    assert LibraryFacts.from_json(facts.as_json()) == facts


@pytest.mark.parametrize(("version", "age"), [("1.4.9", "old"), ("2.0", "new")])
def test_a_version_outside_the_range_is_refused(
    version: str, age: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt_rtx.py").write_text(f"__version__ = {version!r}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(MissingDependency, match=f"tensorrt_rtx {version} is too {age}, it must be 1.5 up to"):
        probe()


@pytest.mark.parametrize("module", ["tensorrt_rtx", "polygraphy"])
def test_without_a_module_the_line_to_install_it_is_given(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{module}.py").write_text("raise ModuleNotFoundError('gone')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(MissingDependency, match=r"\(gone\); pip install 'ilf-trt\[tensorrt-rtx\]'$"):
        probe()


@pytest.mark.parametrize("library", Library)
def test_the_package_asks_for_the_versions_that_are_accepted(library: Library) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (line,) = (line for line in extras[library] if line.startswith("tensorrt"))
    oldest, beyond = (".".join(map(str, end)) for end in VERSIONS[library])
    assert line.partition(">=")[2] == f"{oldest},<{beyond.removesuffix('.0')}"
