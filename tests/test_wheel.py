"""The wheel: every source file in its place, nothing else, and a runtime that imports from it alone."""

import os
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from shutil import copyfile

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"ilf_trt": "ilf_trt", "export": "ilf_trt/export", "engines": "ilf_trt/engines", "runtime": "ilf_trt/runtime"}
BARE_REQUIREMENTS = {"cyclopts", "msgspec", "numpy", "pillow", "platformdirs", "protobuf", "rich"}
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]
TIMEOUT_S = 120


def tracked_files() -> list[str]:
    """Files that git knows and that are there, relative to the root."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout, nothing says which files belong to it")
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tracked files, so that no build folder is left in the checkout."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in tracked_files():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        copyfile(ROOT / name, source / name)
    command = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(output), str(source)]
    subprocess.run(command, check=True, timeout=TIMEOUT_S)
    (built,) = output.iterdir()
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def read(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (found,) = (one for one in archive.namelist() if one.endswith(f".dist-info/{name}"))
        return archive.read(found).decode()


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    return Parser().parsestr(read(wheel, "METADATA"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    command = [*PIP, "install", "--no-deps", "--no-index", "--no-compile", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True, timeout=TIMEOUT_S)
    return target


def python(installed: Path, cwd: Path, *arguments: str) -> str:
    """What a Python says that finds ilf_trt in `installed` first, and nothing in its working folder."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    ran = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def test_the_wheel_holds_the_tracked_sources_of_the_four_folders_and_nothing_else(names: set[str]) -> None:
    sources = set()
    for name in tracked_files():
        folder, _, rest = name.partition("/")
        if folder in FOLDERS and (
            name.endswith((".py", "py.typed"))
            or name.startswith(("ilf_trt/demo/", "ilf_trt/demo_emoji/", "ilf_trt/recipes/"))
        ):
            sources.add(f"{FOLDERS[folder]}/{rest}")
    assert {name for name in names if ".dist-info/" not in name} == sources


def test_the_wheel_holds_a_module_of_every_folder(names: set[str]) -> None:
    assert {f"{package}/__init__.py" for package in (*FOLDERS.values(), "ilf_trt/model/backbones")} <= names
    assert "ilf_trt/py.typed" in names


def test_tests_benchmarks_and_bytecode_stay_out(names: set[str]) -> None:
    assert [name for name in names if name.endswith(".pyc") or {"tests", "benchmarks"} & set(name.split("/"))] == []


def test_the_command_is_an_entry_point(wheel: Path) -> None:
    assert "ilf-trt = ilf_trt.cli:main" in read(wheel, "entry_points.txt").splitlines()


def test_without_extras_seven_packages_are_needed(metadata: Message) -> None:
    requirements = metadata.get_all("Requires-Dist") or []
    bare = {one.split(";")[0].split(">")[0].strip() for one in requirements if "extra ==" not in one}
    assert bare == BARE_REQUIREMENTS


def test_the_licence_and_the_readme_are_in_the_metadata(metadata: Message, names: set[str]) -> None:
    assert metadata["License-Expression"] == "Apache-2.0"
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert str(metadata.get_payload()).startswith("#")


def test_the_runtime_imports_from_the_wheel_without_torch(installed: Path, tmp_path: Path) -> None:
    code = "import sys, ilf_trt.runtime as r; print(r.__file__, 'torch' in sys.modules, 'onnx' in sys.modules)"
    place = installed / "ilf_trt" / "runtime" / "__init__.py"
    assert python(installed, tmp_path, "-c", code) == f"{place} False False"


def test_every_package_of_the_wheel_comes_from_it(installed: Path, tmp_path: Path) -> None:
    packages = [path.replace("/", ".") for path in (*FOLDERS.values(), "ilf_trt/model/backbones")]
    code = f"import importlib.util as u\nfor name in {packages}: print(u.find_spec(name).origin)"
    found = python(installed, tmp_path, "-c", code).splitlines()
    assert found == [str(installed / name.replace(".", "/") / "__init__.py") for name in packages]


def test_the_command_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    plan = ("plan", "--blocks", "28", "--steps", "20", "--feedback", "none")
    assert "block forwards: 560" in python(installed, tmp_path, "-m", "ilf_trt.cli", *plan)
