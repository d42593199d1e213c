"""Who may import whom: what a process loads, seen from outside, and what the source says, read without running it."""

import ast
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
LEAVES = ("export", "engines", "runtime")
FOLDERS = ("ilf_trt", *LEAVES)
TIMEOUT_S = 120.0  # a child ends within seconds; a hang must not take the suite with it

HEAVY = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx_ir", "safetensors", "sklearn", "scipy")
ENGINE_LIBRARIES = ("tensorrt", "tensorrt_rtx", "polygraphy", "cuda")
LIGHT_MODULES = (
    "ilf_trt",
    "ilf_trt.cli",
    "ilf_trt.commands.build",
    "ilf_trt.assembly.conductor",
    "ilf_trt.commands.build_view",
    "ilf_trt.contract.bundle",
    "ilf_trt.contract.class_names",
    "ilf_trt.contract.conditions",
    "ilf_trt.contract.spec",
    "ilf_trt.assembly.staging",
    "ilf_trt.commands.flags",
    "ilf_trt.errors",
    "ilf_trt.contract.manifest",
    "ilf_trt.train.shuffle",
    "ilf_trt.contract.packaged",
    "ilf_trt.commands.flags",
    "ilf_trt.contract.positions",
    "ilf_trt.commands.prepare",
    "ilf_trt.contract.reference_cases",
    "ilf_trt.train.recipe",
    "ilf_trt.contract.plan",
    "ilf_trt.contract.solver",
    "ilf_trt.assembly.build_cache",
    "ilf_trt.contract.target",
    "ilf_trt.commands.train",
    "ilf_trt.engines",
    "ilf_trt.commands.compile",
    "ilf_trt.engines.compiler",
    "ilf_trt.engines.report_view",
    "ilf_trt.engines.worker",
    "ilf_trt.runtime",
    "ilf_trt.runtime.commands",
)
USES_TRANSFORMERS = ("ilf_trt/data/text.py", "export/surroundings_golden.py", "export/text_encoder.py")
USES_TORCH = (
    "export/",
    "ilf_trt/backbone.py",
    "ilf_trt/backbones/",
    "ilf_trt/block.py",
    "ilf_trt/checkpoint.py",
    "ilf_trt/data/",
    "ilf_trt/demo.py",
    "ilf_trt/draws.py",
    "ilf_trt/feed.py",
    "ilf_trt/feedback.py",
    "ilf_trt/losses.py",
    "ilf_trt/model.py",
    "ilf_trt/reference.py",
    "ilf_trt/served_transformer.py",
    "ilf_trt/surgery.py",
    "ilf_trt/training",
    "ilf_trt/transformer.py",
)
USES_DIFFUSERS = (
    "export/",
    "ilf_trt/backbones/",
    "ilf_trt/checkpoint.py",
    "ilf_trt/data/vae.py",
    "ilf_trt/demo.py",
    "ilf_trt/model.py",
    "ilf_trt/reference.py",
    "ilf_trt/served_transformer.py",
    "ilf_trt/training",
)

# Makes every package that serving must not need impossible to import, then runs the command line.
WITHOUT = """
import sys
for name in {names!r}:
    sys.modules[name] = None
from ilf_trt.cli import main
code = main({arguments!r})
loaded = sorted(name for name in {names!r} if sys.modules.get(name) is not None)
print("\\nloaded", loaded, file=sys.stderr)
sys.exit(code)
"""


def run(script: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter in which a warning is an error."""
    command = [sys.executable, "-W", "error", "-c", script]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)


def command_without(arguments: list[str], names: tuple[str, ...] = HEAVY) -> subprocess.CompletedProcess[str]:
    return run(WITHOUT.format(names=names, arguments=arguments))


def loaded_after(statements: str, names: tuple[str, ...]) -> list[str]:
    script = f"{statements}\nimport sys\nprint('\\n'.join(n for n in {names!r} if n in sys.modules), file=sys.stderr)"
    done = run(script)
    assert done.returncode == 0, done.stderr
    return done.stderr.split()


# --- what a process loads


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_importing_it_loads_neither_torch_nor_onnx_nor_an_engine_library(module: str) -> None:
    assert loaded_after(f"import {module}", (*HEAVY, "onnxruntime", *ENGINE_LIBRARIES, "PIL")) == []


def test_a_name_of_the_package_loads_torch_when_it_is_asked_for() -> None:
    assert "torch" in loaded_after("from ilf_trt import attach", HEAVY)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["build", "--help"],
        ["generate", "--help"],
        ["verify", "--help"],
        ["compile", "--help"],
        ["cache", "--help"],
        ["train", "--help"],
        ["train-demo", "--help"],
        ["prepare", "--help"],
        ["plan", "--blocks", "28", "--loop", "8:19", "--steps", "10"],
        ["plan", "--blocks", "28", "--steps", "20", "--cache-blocks", "18", "--cache-every", "3", "--json"],
    ],
    ids=" ".join,
)
def test_the_command_runs_without_loading_what_builds(arguments: list[str]) -> None:
    names = (*HEAVY, "onnxruntime", *ENGINE_LIBRARIES)
    assert loaded_after(f"from ilf_trt.cli import main\nassert main({arguments!r}) == 0", names) == []


def test_generate_runs_where_torch_cannot_be_imported(dit_bundle: Path, tmp_path: Path) -> None:
    latents, picture = tmp_path / "latents.npy", tmp_path / "picture.png"
    done = command_without(
        ["generate", str(dit_bundle), "--labels", "3,8", "--latents-out", str(latents), "-o", str(picture)],
        (*HEAVY, *ENGINE_LIBRARIES),
    )
    assert done.returncode == 0, done.stderr
    assert "loaded []" in done.stderr
    assert np.load(latents).shape == (2, 1, 8, 8)
    assert np.isfinite(np.load(latents)).all()
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_a_bundle_is_read_where_torch_cannot_be_imported(command: str, dit_bundle: Path) -> None:
    done = command_without([command, str(dit_bundle)], (*HEAVY, *ENGINE_LIBRARIES))
    assert done.returncode == 0, done.stderr
    assert "loaded []" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["build", "--checkpoint", "{tmp}/none", "--output", "{tmp}/a.ilf"], "pip install 'ilf-trt[build]'"),
        (["train", "--config", "demo", "--output", "{tmp}/a"], "pip install 'ilf-trt[train]'"),
        (["train", "--config", "demo", "--dry-run"], "pip install 'ilf-trt[train]'"),
        (["train-demo", "--output", "{tmp}/a"], "pip install 'ilf-trt[train,demo]'"),
        (
            ["prepare", "--data-kind", "images", "--path", "{tmp}/a", "--output", "{tmp}/b"],
            "pip install 'ilf-trt[prepare]'",
        ),
    ],
    ids=["build", "train", "train --dry-run", "train-demo", "prepare"],
)
def test_a_command_that_needs_torch_says_what_to_install(arguments: list[str], hint: str, tmp_path: Path) -> None:
    done = command_without([argument.format(tmp=tmp_path) for argument in arguments])
    assert done.returncode == 2, done.stderr
    assert hint in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_build_for_an_engine_library_that_is_not_there_says_what_to_install(tmp_path: Path) -> None:
    done = command_without(
        ["build", "--checkpoint", "demo", "-o", str(tmp_path / "a.ilf"), "--target", "tensorrt"], ENGINE_LIBRARIES
    )
    assert done.returncode == 2, done.stderr
    assert "pip install 'ilf-trt[tensorrt]'" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_generate_without_onnxruntime_says_what_to_install(dit_bundle: Path, tmp_path: Path) -> None:
    arguments = ["generate", str(dit_bundle), "--labels", "3", "-o", str(tmp_path / "picture.png")]
    done = command_without(arguments, (*HEAVY, "onnxruntime"))
    assert done.returncode == 2, done.stderr
    assert "pip install onnxruntime" in done.stderr


# --- what the source says


@dataclass(frozen=True)
class Source:
    """One file of the product: its path from the root, its dotted package, its syntax tree."""

    path: str
    package: str
    tree: ast.Module

    @property
    def folder(self) -> str:
        return self.path.partition("/")[0]


def sources() -> list[Source]:
    found = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = path.relative_to(ROOT)
            parts = relative.parent.parts
            package = ".".join(parts if folder == "ilf_trt" else ("ilf_trt", *parts))
            found.append(Source(relative.as_posix(), package, ast.parse(path.read_text(), path)))
    return found


def source_of(text: str, path: str = "runtime/sample.py") -> Source:
    folder = path.partition("/")[0]
    return Source(path, "ilf_trt" if folder == "ilf_trt" else f"ilf_trt.{folder}", ast.parse(textwrap.dedent(text)))


def imports(source: Source) -> Iterator[str]:
    """Every module that is imported anywhere in a file, in full; `from a import b` counts as a and as a.b."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= 1, f"{source.path}:{node.lineno} leaves its package by a relative import"
            parts = ([source.package] if node.level else []) + ([node.module] if node.module else [])
            module = ".".join(parts)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def strings(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def users_of(package: str, found: list[Source]) -> set[str]:
    return {source.path for source in found if any(within(module, package) for module in imports(source))}


def outside(paths: set[str], allowed: tuple[str, ...]) -> set[str]:
    return {path for path in paths if not path.startswith(allowed)}


def crossings(source: Source) -> set[str]:
    """Leaves that a file reaches into and must not; a leaf's name in a string counts outside of `ilf_trt`."""
    others = [leaf for leaf in LEAVES if leaf != source.folder]
    reached = list(imports(source))
    if source.folder in LEAVES:
        reached += [text for text in strings(source) if text.startswith("ilf_trt.")]
    return {
        leaf for leaf in others if any(within(module, f"ilf_trt.{leaf}") or within(module, leaf) for module in reached)
    }


def dangers(source: Source) -> set[str]:
    """Ways to run what a file or a string says, or to unpickle."""
    found = set()
    for module in imports(source):
        for name in ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"):
            if within(module, name):
                found.add(name)
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("eval", "exec", "compile", "__import__", "torch.load", "os.system", "os.popen"):
                found.add(called)
            for keyword in node.keywords:
                value = ast.unparse(keyword.value)
                if (keyword.arg, value) in (("weights_only", "False"), ("trust_remote_code", "True")):
                    found.add(f"{keyword.arg}={value}")
                if keyword.arg in ("shell", "allow_pickle") and value != "False":
                    found.add(f"{keyword.arg}={value}")
    return found


SOURCES = sources()


def test_the_four_folders_are_read() -> None:
    assert {source.folder for source in SOURCES} == set(FOLDERS)
    assert len(SOURCES) > 30


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.path)
def test_no_file_reaches_into_a_leaf_that_is_not_its_own(source: Source) -> None:
    assert crossings(source) == set()


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.path)
def test_no_file_unpickles_evaluates_or_opens_a_shell(source: Source) -> None:
    assert dangers(source) == set()


def test_torch_is_imported_only_where_models_are() -> None:
    assert outside(users_of("torch", SOURCES), USES_TORCH) == set()


def test_diffusers_is_imported_only_where_it_may() -> None:
    assert outside(users_of("diffusers", SOURCES), USES_DIFFUSERS) == set()


def test_transformers_is_imported_only_where_text_is_embedded() -> None:
    assert outside(users_of("transformers", SOURCES), USES_TRANSFORMERS) == set()


@pytest.mark.parametrize("package", ["onnxscript", "onnx_ir", "onnx"])
def test_what_exports_is_imported_only_in_export(package: str) -> None:
    assert outside(users_of(package, SOURCES), ("export/",)) == set()


@pytest.mark.parametrize("package", ["tensorrt", "tensorrt_rtx", "onnxruntime"])
def test_engine_libraries_are_imported_only_where_engines_are(package: str) -> None:
    assert outside(users_of(package, SOURCES), ("engines/", "runtime/")) == set()


@pytest.mark.parametrize("package", ["tests", "benchmarks", "conftest", "pytest"])
def test_nobody_imports_tests_or_benchmarks(package: str) -> None:
    assert users_of(package, SOURCES) == set()


def test_every_folder_with_code_is_in_the_wheel() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(settings["packages"]) == {source.package for source in SOURCES}


# --- the checks above find what they look for


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("runtime/sample.py", "from ilf_trt.export import graph"),
        ("runtime/sample.py", "from ilf_trt import export"),
        ("runtime/sample.py", "import_module('ilf_trt.engines.build')"),
        ("engines/sample.py", "def late():\n    import ilf_trt.runtime.session"),
        ("export/sample.py", "import runtime"),
        ("ilf_trt/sample.py", "from .runtime import Pipeline"),
        ("ilf_trt/sample.py", "from . import export"),
    ],
)
def test_the_check_finds_a_leaf_that_is_not_its_own(path: str, text: str) -> None:
    assert crossings(source_of(text, path))


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("runtime/sample.py", "from .session import Session\nfrom ilf_trt.runtime.engine import Engine"),
        ("ilf_trt/sample.py", "import_module('ilf_trt.export.bundle')"),
        ("export/sample.py", "from ilf_trt import reference"),
    ],
)
def test_the_check_lets_a_leaf_of_its_own_pass(path: str, text: str) -> None:
    assert crossings(source_of(text, path)) == set()


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from joblib import load",
        "eval('1')",
        "def late():\n    exec(text)",
        "subprocess.run(line, shell=True)",
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "os.system(line)",
    ],
)
def test_the_check_finds_a_danger(text: str) -> None:
    assert dangers(source_of(text))


def test_the_check_lets_eval_mode_and_refused_pickles_pass() -> None:
    assert dangers(source_of("model.eval()\nnp.load(path, allow_pickle=False)\nsession.run(None)")) == set()


def test_the_check_finds_a_torch_user_in_a_function() -> None:
    assert users_of("torch", [source_of("def late():\n    from torch.nn import Module")]) == {"runtime/sample.py"}
