"""Small backbones, checkpoints and bundles that the tests share; each bundle is built once a run."""

import functools
import gc
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
gc.disable()  # until all tests are imported; with it, that takes half as long again

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel, DPMSolverMultistepScheduler, PixArtTransformer2DModel
from hypothesis import HealthCheck, settings

from ilf_trt import ILFModel, attach, save_ilf
from ilf_trt.assembly.conductor import BuildResult, build
from ilf_trt.assembly.options import BuildOptions
from ilf_trt.cli import main
from ilf_trt.contract.spec import BatchRange
from tests.run_folder import built_once, made_once, run_folder

BLOCKS = 4
LOOP = (1, 2)
CLASSES = 10
TEXT_TOKENS = 7
TEXT_CHANNELS = 32
NONZERO_SCALES = (0.05, -0.03)
FAILED = 2
ALLOCATIONS = 100_000  # between two collections of garbage
EXAMPLES = int(os.environ.get("ILF_TRT_FUZZ", 0))  # of each property; `make fuzz` sets it
FEEDBACK_NOISE = 0.01  # without it the feedback block is a copy of the loop's last, and a swap of the two goes unseen

QUIET = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.differing_executors]
settings.register_profile(
    "bounded",
    max_examples=EXAMPLES or 50,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=QUIET,
)
settings.load_profile("bounded")

# What `make check` leaves out: tests that ask, even behind another fixture, for a bundle, an engine or a compiler …
SLOW_ENDINGS = ("_build", "_bundle", "_eight", "_fp8", "_fp16", "_bf16")
SLOW_FIXTURES = frozenset(("built", "bundle", "checkpoint_of", "compiler", "dry", "route", "verified", "wholes"))
# … and files in which nearly every test makes one itself, or starts processes that load torch.
SLOW_FILES = (
    "test_imports.py",
    "test_parity.py",
    "engines/test_builder.py",
    "engines/test_compile_command.py",
    "engines/test_job.py",
    "engines/test_tensorrt.py",
    "engines/test_worker.py",
    "export/pipeline/test_decoder.py",
    "export/pipeline/test_text_encoder.py",
    "ilf_trt/commands/test_train.py",
    "ilf_trt/train/test_cost.py",
    "ilf_trt/train/test_demo.py",
    "ilf_trt/train/test_loop.py",
    "runtime/gpu/test_device.py",
    "runtime/test_pipeline.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the slow ones; a test that makes something slow by itself in another file is marked where it stands."""
    for item in items:
        if is_slow(item):
            item.add_marker(pytest.mark.slow)


def is_slow(item: pytest.Item) -> bool:
    if item.path.relative_to(Path(__file__).parent).as_posix() in SLOW_FILES:
        return True
    names = list(getattr(item, "fixturenames", ()))
    for value in item.callspec.params.values() if hasattr(item, "callspec") else ():
        names += [part for part in (value if isinstance(value, tuple) else (value,)) if isinstance(part, str)]
    return any(name in SLOW_FIXTURES or name.endswith(SLOW_ENDINGS) for name in names)


def small_dit(**changes: Any) -> DiTTransformer2DModel:
    """A DiT of 4 blocks, width 64, 16 tokens, that predicts a variance too."""
    torch.manual_seed(0)
    options = {
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "in_channels": 1,
        "out_channels": 2,
        "num_layers": BLOCKS,
        "sample_size": 8,
        "patch_size": 2,
        "num_embeds_ada_norm": CLASSES,
    }
    return DiTTransformer2DModel(**{**options, **changes}).eval()


def small_pixart(*, sized: bool, **changes: Any) -> PixArtTransformer2DModel:
    """A PixArt of 4 blocks, width 72, 64 tokens; `sized` with alpha's micro-conditions, without like Sigma."""
    torch.manual_seed(0)
    options = {
        "num_attention_heads": 4,
        "attention_head_dim": 18,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": BLOCKS,
        "sample_size": 16,
        "cross_attention_dim": 72,
        "caption_channels": TEXT_CHANNELS,
        "use_additional_conditions": sized,
    }
    return PixArtTransformer2DModel(**{**options, **changes}).eval()


def write_checkpoint(folder: Path, backbone: Any, loop: tuple[int, int] = LOOP) -> Path:
    """An ILF checkpoint as after training: scales not zero, a block of its own; its base and a scheduler beside it."""
    model = attach(backbone, loop)
    with torch.no_grad():
        model.feedback.scales.copy_(torch.linspace(*NONZERO_SCALES, model.loop.size))
        for parameter in model.feedback.block.parameters():
            parameter.add_(FEEDBACK_NOISE * torch.randn_like(parameter))
    save_ilf(model, folder)
    DPMSolverMultistepScheduler().save_pretrained(folder / "scheduler")
    return folder


def train_again(model: ILFModel) -> None:
    """Other values in the feedback block and its scales, in place."""
    torch.manual_seed(5)
    with torch.no_grad():
        model.feedback.scales.mul_(3)
        for parameter in model.feedback.block.parameters():
            parameter.add_(5 * FEEDBACK_NOISE * torch.randn_like(parameter))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_build_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The user's own cache is neither read nor filled, by no process that a test starts."""
    os.environ["ILF_TRT_CACHE"] = str(tmp_path_factory.mktemp("build_cache"))
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))  # the key of the cache


@pytest.fixture(scope="session", autouse=True)
def _garbage_is_collected_seldom() -> None:
    """A tenth of an export is spent on looking through the objects of torch, which all stay, for garbage."""
    gc.freeze()
    gc.set_threshold(ALLOCATIONS, 20, 20)
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _exporter_reads_its_operators_once() -> Iterator[None]:
    """torch.onnx reads its table of operators again for every graph: a quarter of the export of a small one."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield


@pytest.fixture(scope="session")
def dit_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared: write nothing beside it."""
    return made_once(run_folder(tmp_path_factory) / "dit" / "checkpoint", lambda at: write_checkpoint(at, small_dit()))


@pytest.fixture(scope="session")
def pixart_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared: write nothing beside it."""
    folder = run_folder(tmp_path_factory) / "pixart" / "checkpoint"
    return made_once(folder, lambda at: write_checkpoint(at, small_pixart(sized=True)))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conditions of three pictures for a PixArt with micro-conditions, to calibrate on."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("text") / "text.npz"
    text = {
        name: rng.standard_normal((3, TEXT_TOKENS, TEXT_CHANNELS), np.float32) for name in ("text", "negative_text")
    }
    np.savez(path, resolution=np.full((3, 2), 128.0), aspect_ratio=np.ones((3, 1)), **text)
    return path


@pytest.fixture(scope="session")
def dit_build(dit_checkpoint: Path) -> BuildResult:
    """FP32, dynamic batch 1:4:16, 6 steps, feedback outer:2."""
    options = BuildOptions(steps=6)
    return built_once(dit_checkpoint.parent / "dit.ilf", lambda at: build(str(dit_checkpoint), at, options))


@pytest.fixture(scope="session")
def pixart_build(pixart_checkpoint: Path) -> BuildResult:
    """FP32, dynamic batch, 4 steps, feedback outer:1, micro-conditions and masked text."""
    options = BuildOptions(steps=4, feedback="outer:1", text_tokens=TEXT_TOKENS)
    return built_once(pixart_checkpoint.parent / "pixart.ilf", lambda at: build(str(pixart_checkpoint), at, options))


@pytest.fixture(scope="session")
def whole_loop_build(tmp_path_factory: pytest.TempPathFactory) -> BuildResult:
    """A fixed batch of 1, a loop of all of 2 blocks (nothing before, nothing after), text without micro-conditions."""
    options = BuildOptions(batch=BatchRange(1, 1, 1), steps=3, feedback="outer:1", text_tokens=TEXT_TOKENS)

    def make(output: Path) -> BuildResult:
        backbone = small_pixart(sized=False, num_layers=2)
        return build(str(write_checkpoint(output.parent / "checkpoint", backbone, (0, 1))), output, options)

    return built_once(run_folder(tmp_path_factory) / "whole_loop" / "whole_loop.ilf", make)


@pytest.fixture
def dit_bundle(dit_build: BuildResult) -> Path:
    """Shared: copy it before you change it."""
    return dit_build.bundle.path


@pytest.fixture
def pixart_bundle(pixart_build: BuildResult) -> Path:
    """Shared: copy it before you change it."""
    return pixart_build.bundle.path


class Ran:
    """Exit code and output of one command."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def data(self) -> Any:
        return json.loads(self.out)

    def refused(self, *parts: str) -> None:
        """Exit code 2, nothing on stdout, one readable line on stderr that holds `parts`."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        assert self.code == FAILED, self.err
        assert len(lines) == 1, f"{len(lines)} lines:\n{self.err}"
        assert "Traceback" not in lines[0]
        assert [part for part in parts if part not in lines[0]] == [], lines[0]
        assert self.out == ""


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """One command in this process."""

    def runs(*tokens: object) -> Ran:
        capsys.readouterr()
        try:
            code = main([str(token) for token in tokens])
        except SystemExit as left:
            code = int(left.code or 0)
        return Ran(code, *capsys.readouterr())

    return runs
