"""The parts of the study against results by hand: judges, samplers, traces and tables."""

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import pairwise_distances

from benchmarks.study import (
    arithmetic,
    cifar10,
    features,
    judge,
    quality,
    resnet,
    samplers,
    shrinkage,
    tables,
    trainings,
)
from ilf_trt import attach, save_ilf
from ilf_trt.contract.plan import SCHEDULERS, Ratio, Rule, make_plan
from ilf_trt.contract.spec import Loop
from ilf_trt.model.base import load_backbone
from ilf_trt.model.sampling import sample
from tests.conftest import BLOCKS, CLASSES, LOOP, small_dit

SOLVER = SCHEDULERS["dpmsolver++"]
CLOSE = 1e-9  # sums of a few hundred numbers in float64
FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def digits_judge() -> Any:
    return judge.DigitsJudge()


def pictures(count: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).uniform(-1, 1, (count, 1, 8, 8)).astype(np.float32)


# --- judges


def test_the_distance_of_two_gaussians_is_the_closed_form() -> None:
    a = judge.Gaussian(np.array([0.0, 0.0]), np.diag([1.0, 4.0]))
    b = judge.Gaussian(np.array([3.0, 4.0]), np.diag([9.0, 16.0]))
    assert a.distance(b) == pytest.approx(25 + (3 - 1) ** 2 + (4 - 2) ** 2, abs=CLOSE)
    assert a.distance(a) == pytest.approx(0, abs=CLOSE)


def test_the_real_digits_are_at_no_distance_and_have_their_labels(digits_judge: Any) -> None:
    real = digits_judge.real.reshape(-1, 1, 8, 8).astype(np.float32)
    numbers = digits_judge.judge(real)
    assert numbers["frechet"] == pytest.approx(0, abs=1e-3)
    assert numbers["accuracy"] > 0.99
    assert (numbers["precision"], numbers["recall"], numbers["coverage"]) == (1, 1, 1)


def test_noise_is_far_from_the_digits(digits_judge: Any) -> None:
    numbers = digits_judge.judge(pictures(len(digits_judge.labels)))
    assert numbers["frechet"] > 10
    assert numbers["accuracy"] < 0.3
    assert numbers["precision"] < 0.1
    assert numbers["coverage"] < 0.1


def test_one_class_alone_is_precise_but_recalls_little(digits_judge: Any) -> None:
    ones = digits_judge.real[digits_judge.labels == 1]
    numbers = judge.manifold(digits_judge.real, ones)
    assert numbers["precision"] == 1
    assert numbers["recall"] < 0.5
    assert numbers["coverage"] < 0.5


def test_precision_and_density_are_counts_of_balls() -> None:
    random = np.random.default_rng(1)
    real, generated, k = random.normal(size=(40, 3)), random.normal(size=(30, 3)), 5
    among = np.sort(pairwise_distances(real), axis=1)[:, k]
    inside = pairwise_distances(generated, real) <= among[None]
    numbers = judge.manifold(real, generated)
    assert numbers["precision"] == pytest.approx(inside.any(1).mean(), abs=CLOSE)
    assert numbers["density"] == pytest.approx(inside.sum() / (k * len(generated)), abs=CLOSE)
    assert numbers["coverage"] == pytest.approx(inside.any(0).mean(), abs=CLOSE)


def test_psnr_of_a_known_error_and_of_none() -> None:
    same = np.zeros((2, 1, 4, 4), np.float32)
    assert judge.psnr(same + 0.2, same) == pytest.approx(20, abs=1e-4)  # 10 log10(4 / 0.04)
    assert judge.psnr(same, same) > 90


def test_the_classifier_reads_its_public_names_and_tells_pictures_apart(tmp_path: Path) -> None:
    network = resnet.ResNet(2).eval()
    torch.save({"state_dict": {f"module.{n}": v for n, v in network.state_dict().items()}}, tmp_path / "small.th")
    loaded = resnet.load(tmp_path / "small.th")
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        stages = loaded.stages(images)
        assert [tuple(stage.shape) for stage in stages] == [(3, 16, 32, 32), (3, 32, 16, 16), (3, 64, 8, 8)]
        assert torch.equal(stages[-1], network.stages(images)[-1])
    assert judge.stages(loaded, images, images) == pytest.approx(0, abs=1e-6)
    assert judge.stages(loaded, images, -images) > 0.1


def test_mosaics_are_cut_row_by_row(tmp_path: Path) -> None:
    sheet = np.zeros((64, 96, 3), np.uint8)
    for index in range(6):
        sheet[index // 3 * 32 : index // 3 * 32 + 32, index % 3 * 32 : index % 3 * 32 + 32] = index
    Image.fromarray(sheet).save(tmp_path / "train_4_deer_5.webp", lossless=True)
    images, labels = cifar10.read(tmp_path, "train")
    assert [int(image.mean()) for image in images] == [0, 1, 2, 3, 4]
    assert labels.tolist() == [4] * 5


def test_a_base_of_pictures_is_written_in_float16_and_read_in_float32(tmp_path: Path) -> None:
    sheet = np.random.default_rng(0).integers(0, 255, (32, 64, 3), np.uint8)
    Image.fromarray(sheet).save(tmp_path / "train_4_deer_2.webp", lossless=True)
    cifar10.train(tmp_path, tmp_path / "base", width=32, patch=16, iterations=1, seed=0, compiled=False, device="cpu")
    weights = load_file(tmp_path / "base" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}
    base = load_backbone(str(tmp_path / "base"))
    assert {value.dtype for value in base.state_dict().values()} == {torch.float32}


def test_gelu_by_exp_is_gelu() -> None:
    x = torch.linspace(-30, 30, 2001)
    for approximate in ("tanh", "none"):
        expected = torch.nn.functional.gelu(x.double(), approximate=approximate)
        with arithmetic.arithmetic_on("cpu"):
            values = torch.nn.functional.gelu(x, approximate=approximate)
        torch.testing.assert_close(values.double(), expected, rtol=0, atol=2e-6)


# --- samplers


def test_every_sampler_is_named_once_for_each_training() -> None:
    every = samplers.samplers()
    names = [(sampler.part, sampler.name, sampler.training) for sampler in every]
    assert len(set(names)) == len(names)


def test_every_training_of_a_sampler_is_one_that_is_made() -> None:
    changes = trainings.CHANGES
    for sampler in samplers.samplers():
        assert not sampler.training or sampler.training.partition("/")[0] in changes


def test_every_training_is_a_recipe() -> None:
    recipe = import_module("ilf_trt.train.recipe").Recipe
    for changes in trainings.CHANGES.values():
        assert recipe.read("demo", changes) is not None
        assert recipe.read("cifar10", changes) is not None


def test_the_paper_s_equal_costs_are_equal() -> None:
    def cost(steps: int, feedback: str) -> int:
        return make_plan(SOLVER, steps, blocks=12, loop=Loop(3, 7), feedback=feedback).block_forwards

    assert cost(12, "none") == cost(10, "outer:2") == cost(8, "all") == 144
    assert cost(9, "none") == cost(6, "all") == cost(7, "outer:2") == cost(8, "outer:1") == 108
    assert cost(11, "outer:1") == cost(9, "outer:3") == 144


class ThreeLabels:
    labels = np.arange(3)


@pytest.fixture(scope="module")
def draw() -> Any:
    """Draws three pictures of one seed from the demo's base."""
    study = quality.Study("demo", ThreeLabels(), Path(), None, "cpu", None, far=False)

    def draw(**options: Any) -> Any:
        kind = samplers.Kind.ILF if "feedback" in options else samplers.Kind.PLAIN
        with study.drawing(samplers.Sampler("main", "one", kind, 3, **options)) as drawing:
            return drawing(1)[0]

    return draw


def test_rows_tell_one_base_and_one_training_from_another(tmp_path: Path) -> None:
    def weights(base: str, training: str) -> str:
        study = quality.Study(base, ThreeLabels(), tmp_path, None, "cpu", None, far=False)
        digest: str = study.weights(training)
        return digest

    for name, scale in (("one", 0.1), ("two", 0.2)):
        model = attach(small_dit(), LOOP)
        torch.nn.init.constant_(model.feedback.scales, scale)
        save_ilf(model, tmp_path / name)
    every = {weights("demo", ""), weights(str(tmp_path / "one"), ""), weights("demo", "one"), weights("demo", "two")}
    assert len(every) == 4
    assert weights("demo", "one") == weights("demo", "one")


class DifferenceJudge(ThreeLabels):
    """Measures only the largest difference of two pictures."""

    def judge(self, _pictures: Any) -> dict[str, float]:
        return {"frechet": 0.0}

    def distances(self, pictures: Any, reference: Any) -> dict[str, float]:
        return {"psnr_db": float(np.abs(pictures - reference).max()), "feature_distance": 0.0}


def test_the_long_run_of_a_seed_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr(quality, "LONG", 4)
    study = quality.Study("demo", DifferenceJudge(), Path(), None, "cpu", None, far=True)
    drawing, drawn = quality.Study.drawing, []
    monkeypatch.setattr(
        quality.Study, "drawing", lambda self, sampler: drawn.append(sampler.steps) or drawing(self, sampler)
    )

    def apart(steps: int, seed: int) -> Any:
        sampler = samplers.Sampler("main", f"plain {steps}", samplers.Kind.PLAIN, steps)
        with study.drawing(sampler) as draw:
            return study.measure(sampler, draw, seed)["psnr_db"]

    assert apart(4, 1) == 0
    assert apart(3, 1) > 0.01
    assert apart(3, 2) == ""
    assert drawn == [4, 3, 3]


def test_a_block_that_was_never_trained_leaves_only_the_shift(draw: Any) -> None:
    plain = draw()
    assert np.allclose(draw(feedback="all", rule=Rule.NONE), plain, **FLOAT32)
    assert np.abs(draw(feedback="all", rule=Rule.ANNEAL) - plain).max() > 0.01


def test_guidance_and_a_smaller_noise_reach_the_pictures(draw: Any) -> None:
    plain = draw()
    assert np.abs(draw(guidance_scale=1.5) - plain).max() > 0.01
    assert np.abs(draw(noise_over=1.02) - plain).max() > 0.01


def test_noise_is_divided_at_the_last_layer() -> None:
    model, call = attach(small_dit(), LOOP), {"timestep": torch.tensor([500]), "class_labels": torch.tensor([1])}
    x = torch.randn(1, *model.adapter.latent)
    with torch.no_grad():
        before = model(x, **call).sample
        quality._divide_noise(model, 1.25)
        assert torch.allclose(model(x, **call).sample, before / 1.25, **FLOAT32)


def test_a_share_is_what_is_predicted_of_the_noise() -> None:
    alphas = torch.linspace(0.999, 0.01, 1000)

    def nine_tenths(x_t: torch.Tensor, time: torch.Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(sample=0.9 * x_t / (1 - alphas[time[0]]).sqrt())

    black, labels = torch.zeros(8, 1, 4, 4), torch.zeros(8, dtype=torch.long)
    rows = list(shrinkage.shares(nine_tenths, black, labels, alphas, feedback=False))
    assert {row["what"] for row in rows} == {"base", "teacher at t/2"}
    assert {row["share"] for row in rows} == {0.9}


# --- traces


@pytest.mark.parametrize("feedback", ["none", "all", "outer:1"])
def test_a_trace_leads_to_the_same_picture_as_generation(feedback: str) -> None:
    trace_class = features.Trace
    model = attach(small_dit(), LOOP)
    torch.nn.init.constant_(model.feedback.scales, 0.3)
    plan = make_plan(
        SOLVER, 4, blocks=BLOCKS, loop=model.loop, feedback=feedback, rule=Rule.ANNEAL, ratio=Ratio.LOOP_TO_MODEL
    )
    noise, labels = torch.randn(2, *model.adapter.latent), torch.tensor([0, 1]) % CLASSES
    last: list[torch.Tensor] = []
    trace = trace_class(model)
    step = trace._step
    trace._step = lambda *inputs: last.append(step(*inputs)[1]) or step(*inputs)
    list(trace.run(plan, SOLVER, labels, noise))
    samples: list[torch.Tensor] = []
    model.register_forward_hook(lambda _m, _i, output: samples.append(output.sample[:, : model.adapter.latent[0]]))
    sample(model, plan, SOLVER, {"class_labels": labels}, noise, guidance_scale=1.0, guidance=False)
    assert torch.allclose(last[-1], samples[-1], **FLOAT32)


def test_a_cached_trace_runs_the_middle_blocks_only_when_they_are_due() -> None:
    model = attach(small_dit(), LOOP)
    plan = make_plan(SOLVER, 4, blocks=BLOCKS, loop=model.loop, feedback="none")
    runs: list[int] = []
    block = model.adapter.block
    model.adapter.block = lambda one, *rest: runs.append(list(model.adapter.blocks).index(one)) or block(one, *rest)
    trace = features.Trace(model, every=3)
    list(trace.run(plan, SOLVER, torch.zeros(1, dtype=torch.long), torch.randn(1, *model.adapter.latent)))
    cached = list(trace.cached)
    assert cached
    assert [runs.count(number) for number in cached] == [2] * len(cached)  # steps 0 and 3
    assert all(runs.count(number) == 4 for number in range(BLOCKS) if number not in cached)


# --- tables


def test_a_table_has_means_over_seeds_in_the_order_of_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = {"weights": "a", "training": "", "feature_distance": "nan", "psnr_db": "20", "accuracy": "0.9"}
    shared |= dict.fromkeys(("precision", "recall", "density", "coverage"), "0.5")
    rows = [
        {**shared, "sampler": "plain 6", "block_forwards": "72", "seed": "1", "frechet": "0.5"},
        {**shared, "sampler": "plain 20", "block_forwards": "240", "seed": "2", "frechet": "0.3"},
        {**shared, "sampler": "plain 20", "block_forwards": "240", "seed": "1", "frechet": "0.1"},
    ]
    monkeypatch.setattr(tables, "read_rows", lambda _: rows)
    lines = tables.study("digits", "main").splitlines()
    assert "features apart" not in lines[0]
    assert lines[2].startswith("| plain 20 | – | 240 | 0.200 (0.100 0.300) | 0.900 |")
    assert lines[3].startswith("| plain 6 | – | 72 | 0.500 |")
    assert tables.study("digits", "rules") == "Not measured."
    rows[2]["weights"] = "b"
    with pytest.raises(SystemExit, match=r"plain 20 \(no training\) from several weights"):
        tables.study("digits", "main")
