"""Scores of pictures by their prompts: paired with the base line, and through libraries that are stand-ins."""

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ilf_trt.bench.agreement import PictureCheck
from ilf_trt.bench.inputs import write_latents
from ilf_trt.bench.measured import Measured
from ilf_trt.bench.options import BenchOptions
from ilf_trt.bench.report_html import report_html
from ilf_trt.bench.report_md import report_md
from ilf_trt.bench.row import Row, Side
from ilf_trt.bench.score_process import ScoreProcess
from ilf_trt.bench.scores import PictureScore, Score
from ilf_trt.bench.sentences import score_lines
from ilf_trt.bench.statistics import mean_interval
from ilf_trt.contract.plan import make_plan
from ilf_trt.contract.solver import DEFAULT_SCHEDULER
from ilf_trt.contract.spec import Loop
from ilf_trt.errors import InvalidRequest, MissingDependency
from tests.ilf_trt.bench.synthetic import result

PLAN = make_plan(DEFAULT_SCHEDULER, 2, blocks=4, loop=Loop(1, 2), feedback="none")
PROMPTS = ("a cat", "a dog", "a fish")


class Engines:
    """The runtime's process: latents are the number of the row, and so are the pixels."""

    def ask(self, do: str, /, *, path: str, slug: str = "") -> dict[str, Any]:
        if do == "latents":
            write_latents(Path(path), np.full((2, 1, 4, 4), int(slug), np.float32))
        else:
            write_latents(Path(path), np.load(path).astype(np.uint8).reshape(2 * CHUNKS, 4, 4, 1))
        return {"pixels": True}


class Scorer:
    """Scores are the pixels times ten, plus a number by the prompt."""

    def __init__(self) -> None:
        self.prompts: list[str] = []

    def ask(self, do: str, /, *, path: str, prompts: list[str]) -> dict[str, list[float]]:
        self.prompts = prompts
        return {"clip-score": [10.0 * one.mean() + len(text) for one, text in zip(np.load(path), prompts, strict=True)]}


CHUNKS = 3


def test_a_rows_score_is_paired_with_the_base_lines_picture_by_picture(tmp_path: Path) -> None:
    workers: Any = {Side.RUNTIME: Engines()}
    scorer: Any = Scorer()
    check = PictureCheck(workers, tmp_path, PLAN, PLAN, scorer=scorer, prompts=PROMPTS, batch=2)
    rows = [Measured(Row(slug, slug, Side.RUNTIME, PLAN), 2) for slug in ("3", "5")]
    for _ in range(CHUNKS):
        check.add_chunk(rows)
    assert set(check.judge(rows, CHUNKS)) == {"3", "5"}
    assert scorer.prompts == ["a cat", "a dog"] * CHUNKS
    assert rows[0].scores == (PictureScore("clip-score", 35.0),)
    assert rows[1].scores == (PictureScore("clip-score", 55.0, 20.0, 20.0, 20.0),)


def test_the_interval_of_a_mean_holds_the_true_one_in_nineteen_of_twenty() -> None:
    rng = np.random.default_rng(0)
    intervals = [mean_interval(list(rng.normal(-1.0, 2.0, 40))) for _ in range(200)]
    assert sum(not interval.excludes(-1.0) for interval in intervals) / 200 >= 0.9
    with pytest.raises(ValueError, match="no values were measured"):
        mean_interval([])


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchmetrics and ImageReward, which score by the mean of the pixels."""

    class CLIPScore:
        def __init__(self, model_name_or_path: str) -> None:
            assert model_name_or_path == "openai/clip-vit-base-patch16"

        def to(self, device: str) -> "CLIPScore":
            return self

        def __call__(self, pictures: list[torch.Tensor], texts: list[str]) -> torch.Tensor:
            ((picture,), (text,)) = pictures, texts
            assert picture.shape[0] == 3
            assert picture.dtype == torch.uint8
            return picture.float().mean() + len(text)

    class Reward:
        def score(self, prompt: str, pictures: list[Any]) -> float:
            return float(np.asarray(pictures[0]).mean()) - len(prompt)

    multimodal, reward = ModuleType("torchmetrics.multimodal"), ModuleType("ImageReward")
    multimodal.CLIPScore = CLIPScore  # type: ignore[attr-defined]
    reward.load = lambda name, device: Reward()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchmetrics", SimpleNamespace(multimodal=multimodal, __path__=[]))
    monkeypatch.setitem(sys.modules, "torchmetrics.multimodal", multimodal)
    monkeypatch.setitem(sys.modules, "ImageReward", reward)


@pytest.mark.parametrize("channels", [1, 3])
def test_each_picture_is_scored_with_its_own_prompt(channels: int, libraries: None, tmp_path: Path) -> None:
    process = ScoreProcess()
    process.load({"scores": ["clip-score", "image-reward"], "device": "cpu"})
    pictures = np.stack([np.full((4, 4, channels), value, np.uint8) for value in (10, 20)])
    write_latents(tmp_path / "pictures.npy", pictures)
    scores = process.score({"path": str(tmp_path / "pictures.npy"), "prompts": ["ab", "abcd"]})
    assert scores == {"clip-score": [12.0, 24.0], "image-reward": [8.0, 16.0]}


@pytest.mark.parametrize(("score", "extra"), [("clip-score", "clip"), ("image-reward", "image-reward")])
def test_a_library_that_is_missing_is_named_with_its_extra(
    score: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("torchmetrics", "torchmetrics.multimodal", "ImageReward"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependency, match=rf"--scores {score} needs its library .*'ilf-trt\[{extra}\]'"):
        ScoreProcess().load({"scores": [score], "device": "cpu"})


def test_scores_need_prompts_and_a_known_name() -> None:
    with pytest.raises(InvalidRequest, match="--scores compares pictures with their prompts; pass --prompt TEXT"):
        BenchOptions(Path("bundle"), scores=(Score.CLIP,)).check()
    with pytest.raises(InvalidRequest, match="--scores names 'beauty', it takes clip-score, image-reward"):
        Score.parse_all("clip-score,beauty")
    assert Score.parse_all("image-reward, clip-score,clip-score") == (Score.CLIP, Score.IMAGE_REWARD)


def test_every_view_shows_the_paired_difference() -> None:
    whole = result()
    scores = (PictureScore("clip-score", 31.25), PictureScore("image-reward", 0.5, -0.01, -0.02, 0.03))
    whole = replace(whole, rows=(replace(whole.rows[0], scores=scores), *whole.rows[1:]))
    title = whole.rows[0].title
    assert score_lines(whole.rows) == [
        (title, "1", "clip-score", "31.250", "–"),
        (title, "1", "image-reward", "0.500", "-0.010 (-0.020 to +0.030)"),
    ]
    for page in (report_md(whole, {}), report_html(whole)):
        assert "-0.010 (-0.020 to +0.030)" in page
