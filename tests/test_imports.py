"""What a process loads, and what the source must not say. The law of imports itself is kept by `make lint`."""

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
LIGHT = ("ilf_trt/assembly/", "ilf_trt/commands/", "ilf_trt/contract/", "engines/", "runtime/")
"""The wings that serving and the command line load; `ilf_trt/*.py` and the recipe belong to them."""

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


def test_the_light_wings_load_neither_torch_nor_onnx_nor_an_engine_library() -> None:
    modules = [source.module for source in SOURCES if source.path.startswith(LIGHT) or source.path.count("/") == 1]
    light = [module for module in modules if not module.startswith("ilf_trt.export")]
    assert len(light) > 80
    imports = "\n".join(f"import {module}" for module in (*light, "ilf_trt.train.recipe") if "__main__" not in module)
    assert loaded_after(imports, (*HEAVY, "onnxruntime", *ENGINE_LIBRARIES, "PIL")) == []


def test_a_name_of_the_package_loads_torch_when_it_is_asked_for() -> None:
    assert "torch" in loaded_after("from ilf_trt import attach", HEAVY)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["build", "--help"],
        ["generate", "--help"],
        ["replay", "--help"],
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
    again = command_without(["replay", str(picture), "--bundle", str(dit_bundle)], (*HEAVY, *ENGINE_LIBRARIES))
    assert (again.returncode, again.stdout) == (0, "the same to the bit\n"), again.stderr
    assert "loaded []" in again.stderr


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
    assert "pip install 'ilf-trt[cpu]'" in done.stderr


def test_a_build_that_cannot_verify_says_what_to_install_before_it_exports(tmp_path: Path) -> None:
    done = command_without(["build", "--checkpoint", "demo", "-o", str(tmp_path / "a.ilf")], (*HEAVY, "onnxruntime"))
    assert done.returncode == 2, done.stderr
    assert "pip install 'ilf-trt[cpu]'" in done.stderr
    assert list(tmp_path.iterdir()) == []


# --- what the source says


@dataclass(frozen=True)
class Source:
    """One file of the product: its path from the root, its dotted package, its syntax tree."""

    path: str
    package: str
    tree: ast.Module

    @property
    def module(self) -> str:
        name = Path(self.path).stem
        return self.package if name == "__init__" else f"{self.package}.{name}"


def sources() -> list[Source]:
    files = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = path.relative_to(ROOT)
            if relative.parts[:2] in [("ilf_trt", leaf) for leaf in LEAVES]:
                continue  # a link to the leaf's own folder
            parts = relative.parent.parts
            package = ".".join(parts if folder == "ilf_trt" else ("ilf_trt", *parts))
            files.append(Source(relative.as_posix(), package, ast.parse(path.read_text(), path)))
    return files


def source_of(text: str, path: str = "runtime/sample.py") -> Source:
    return Source(path, "ilf_trt.runtime", ast.parse(textwrap.dedent(text)))


def imports(source: Source) -> Iterator[str]:
    """Every module that is imported anywhere in a file, in full; `from a import b` counts as a and as a.b."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level < 2, f"{source.path}:{node.lineno} reaches into the folder above; name the module in full"
            module = ".".join(part for part in (source.package if node.level else None, node.module) if part)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def leaves_in_strings(source: Source) -> set[str]:
    """Leaves that a file names in a string, such as for `import_module`; a leaf may name itself."""
    own = source.path.partition("/")[0]
    texts = [node.value for node in ast.walk(source.tree) if isinstance(node, ast.Constant)]
    names = [text for text in texts if isinstance(text, str) and not any(mark in text for mark in " \n")]
    return {leaf for leaf in LEAVES if leaf != own and any(within(name, f"ilf_trt.{leaf}") for name in names)}


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
                writes = called.endswith(("savez", "savez_compressed"))
                if keyword.arg in ("shell", "allow_pickle") and (value != "False" or writes):
                    found.add(f"{keyword.arg}={value}")
    return found


SOURCES = sources()


def test_the_four_folders_are_read() -> None:
    assert {source.path.partition("/")[0] for source in SOURCES} == set(FOLDERS)
    assert len(SOURCES) > 100


def test_only_one_file_names_a_leaf_in_a_string() -> None:
    assert {source.path: names for source in SOURCES if (names := leaves_in_strings(source))} == {
        "ilf_trt/leaves.py": {"runtime"}
    }


def test_no_file_unpickles_evaluates_or_opens_a_shell() -> None:
    assert {source.path: found for source in SOURCES if (found := dangers(source))} == {}


def test_every_folder_with_code_is_in_the_wheel() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(settings["packages"]) == {source.package for source in SOURCES}


def test_the_links_to_the_leaves_are_there() -> None:
    """Without them `python -m benchmarks.…` would find `./ilf_trt` without its leaves, and mypy no types of theirs."""
    for leaf in LEAVES:
        assert (ROOT / "ilf_trt" / leaf).resolve() == (ROOT / leaf).resolve()


# --- the checks above find what they look for


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("runtime/sample.py", "import_module('ilf_trt.engines.build')"),
        ("ilf_trt/sample.py", "COMMAND = 'ilf_trt.runtime.commands:generate'"),
    ],
)
def test_the_check_finds_a_leaf_in_a_string(path: str, text: str) -> None:
    assert leaves_in_strings(source_of(text, path))


def test_the_check_lets_a_leaf_name_itself() -> None:
    assert (
        leaves_in_strings(source_of("[sys.executable, '-m', 'ilf_trt.engines.worker']", "engines/sample.py")) == set()
    )


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
        "np.savez(path, allow_pickle=False)",
        "os.system(line)",
    ],
)
def test_the_check_finds_a_danger(text: str) -> None:
    assert dangers(source_of(text))


def test_the_check_lets_eval_mode_and_refused_pickles_pass() -> None:
    assert dangers(source_of("model.eval()\nnp.load(path, allow_pickle=False)\nsession.run(None)")) == set()
