"""The demo: the checkpoint in the package loads and is small, and both trainings write what they should."""

import shutil
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from ilf_trt import ILFModel, load_ilf
from ilf_trt.contract.spec import Loop
from ilf_trt.errors import CheckpointError
from ilf_trt.model.checkpoint import read_checkpoint
from ilf_trt.train.data.digits import digit_batches, digits_stream
from ilf_trt.train.demo import train
from ilf_trt.train.recipe import Loss, Recipe

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
    paths = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.name for path in paths} >= {"ilf.json", "ilf.safetensors", "config.json", "scheduler_config.json"}
    assert {path.suffix or path.name for path in paths} <= {".json", ".safetensors", "NOTICE"}
    assert sum(path.stat().st_size for path in paths) <= MAX_BYTES


def test_the_demo_s_scales_were_trained(demo: ILFModel) -> None:
    assert demo.feedback.scales.shape == (5,)
    assert demo.feedback.scales.abs().min() > 0


def test_the_demo_knows_how_it_was_trained() -> None:
    training, recipe = read_checkpoint("demo").training, Recipe.read("demo")
    assert training["iteration"] == recipe.optimisation.iterations
    assert Loss(**training["loss"]) == recipe.loss  # fields that are younger than the demo have their defaults
    facts = {name: value for name, value in recipe.facts().items() if name != "loss"}
    assert {name: training[name] for name in facts} == facts


def test_the_demo_finds_its_scheduler() -> None:
    assert read_checkpoint("demo").scheduler_config()["_class_name"] == "DPMSolverMultistepScheduler"


@torch.no_grad()
def test_the_demo_s_output_is_finite_and_depends_on_label_and_feedback(demo: ILFModel) -> None:
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    three, null = torch.tensor([3, 3]), torch.tensor([CLASSES, CLASSES])
    with_feedback = demo(x, 500, three, t_post=480).sample
    assert with_feedback.isfinite().all()
    assert not torch.equal(with_feedback, demo(x, 500, null, t_post=480).sample)
    assert not torch.equal(with_feedback, demo(x, 500, three, feedback=False).sample)


# --- training it again


@pytest.fixture(scope="module")
def again(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two iterations of each training."""
    folder = tmp_path_factory.mktemp("demo")
    train(folder, seed=0, base_iterations=2, feedback_iterations=2)
    return folder


def test_trained_again_it_is_a_checkpoint_with_its_base_beside(again: Path) -> None:
    model = load_ilf(again)
    assert model.feedback.scales.abs().min() > 0
    checkpoint = read_checkpoint(again)
    assert (checkpoint.base, checkpoint.training["iteration"]) == (str(again / "transformer"), 2)
    assert (again / "scheduler" / "scheduler_config.json").is_file()
    assert (again / "training" / "log.jsonl").is_file()


def test_the_moved_checkpoint_still_finds_its_base(again: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(again, tmp_path / "moved", symlinks=True))
    assert read_checkpoint(moved).base == str(moved / "transformer")


def test_without_base_iterations_the_base_is_kept_and_the_feedback_goes_on(again: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(again, tmp_path / "copy", symlinks=True))
    steps: list[tuple[str, int]] = []
    train(
        copy,
        seed=0,
        base_iterations=0,
        feedback_iterations=3,
        progress=lambda what, iteration, *_: steps.append((what, iteration)),
    )
    assert steps == [("feedback", 3)]
    weights = Path("transformer") / "diffusion_pytorch_model.safetensors"
    assert (copy / weights).read_bytes() == (again / weights).read_bytes()


def test_a_base_trained_again_starts_the_feedback_again(again: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(again, tmp_path / "copy", symlinks=True))
    train(copy, seed=1, base_iterations=1, feedback_iterations=1)
    assert [path.name for path in (copy / "training" / "steps").iterdir()] == ["00000001"]


def test_no_base_to_keep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no base to keep"):
        train(tmp_path, seed=0, base_iterations=0, feedback_iterations=1)


def test_training_leaves_torch_s_threads_as_they_were(again: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    with pytest.raises(CheckpointError):
        train(tmp_path / "none", seed=0, base_iterations=0)
    assert torch.get_num_threads() == before


def test_batches_of_the_base_have_a_tenth_of_null_labels() -> None:
    labels = next(digit_batches(2000, 0)).conditions["class_labels"]
    assert (labels == CLASSES).float().mean().item() == pytest.approx(0.1, abs=0.034)  # five standard errors


def test_the_stream_holds_all_digits_in_range() -> None:
    rows = digits_stream(global_batch=4, seed=0).rows
    assert (len(rows.x0), rows.x0.min().item(), rows.x0.max().item()) == (1797, -1.0, 1.0)
    assert set(rows.conditions["class_labels"].tolist()) == set(range(CLASSES))
