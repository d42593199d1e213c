"""The demo checkpoint in the package: it loads, and it is small."""

from importlib.resources import files
from pathlib import Path

import pytest
import torch

from ilf_trt import ILFModel, load_ilf
from ilf_trt.checkpoint import read_checkpoint
from ilf_trt.contract import Loop

MAX_PARAMETERS = 1_500_000
MAX_BYTES = 6_000_000
CLASSES = 10


@pytest.fixture(scope="module")
def demo() -> ILFModel:
    return load_ilf("demo")


def test_the_demo_has_twelve_blocks_and_the_loop_of_the_recipe(demo: ILFModel) -> None:
    assert len(demo.adapter.blocks) == 12
    assert demo.loop == Loop(3, 7)
    assert demo.adapter.latent == (1, 8, 8)


def test_the_demo_s_base_is_small(demo: ILFModel) -> None:
    assert sum(p.numel() for p in demo.backbone.parameters()) <= MAX_PARAMETERS


def test_the_demo_s_files_are_small_and_none_is_a_pickle() -> None:
    folder = Path(str(files("ilf_trt") / "demo"))
    found = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.name for path in found} >= {"ilf.json", "ilf.safetensors", "config.json", "scheduler_config.json"}
    assert {path.suffix for path in found} <= {".json", ".jsonl", ".safetensors", ".md"}
    assert sum(path.stat().st_size for path in found) <= MAX_BYTES


def test_the_demo_s_scales_were_trained(demo: ILFModel) -> None:
    assert demo.feedback.scales.shape == (5,)
    assert demo.feedback.scales.abs().min() > 0


def test_the_demo_knows_how_it_was_trained() -> None:
    training = read_checkpoint("demo").training
    assert {"iterations", "batch_size", "learning_rate", "seed", "teacher", "second_pass", "data"} <= training.keys()


def test_the_demo_finds_its_scheduler() -> None:
    assert read_checkpoint("demo").scheduler_config()["_class_name"] == "DPMSolverMultistepScheduler"


@torch.no_grad()
def test_the_demo_s_output_is_finite_and_depends_on_label_and_feedback(demo: ILFModel) -> None:
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    three, null = torch.tensor([3, 3]), torch.tensor([CLASSES, CLASSES])
    fed = demo(x, 500, three, t_post=480).sample
    assert fed.isfinite().all()
    assert not torch.equal(fed, demo(x, 500, null, t_post=480).sample)
    assert not torch.equal(fed, demo(x, 500, three, feedback=False).sample)
