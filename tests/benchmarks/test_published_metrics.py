"""The published metrics with small fakes for their libraries, which take the arguments that the real ones take."""

import csv
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import record
from benchmarks.metrics import prompts, published
from ilf_trt.errors import InvalidRequest, MissingDependency

ASPECTS = ("quality", "noisiness", "colorfullness", "natural")
CLEAN = {"mode": "clean", "model_name": "inception_v3", "batch_size": 2, "device": torch.device("cpu")}
CLOSE = 1e-9  # means of a few numbers in float64

# Parameters as the real packages have them: clean-fid 0.1.35, torchmetrics 1.9.0, image-reward 1.5.
REAL = {
    ("cleanfid.fid", "compute_fid"): (
        "fdir1 fdir2 gen mode model_name num_workers batch_size device dataset_name dataset_res dataset_split num_gen "
        "z_dim custom_feat_extractor verbose custom_image_tranform custom_fn_resize use_dataparallel"
    ),
    ("cleanfid.fid", "test_stats_exists"): "name mode model_name metric",
    ("torchmetrics.multimodal", "CLIPScore.__init__"): "self model_name_or_path kwargs",
    ("torchmetrics.multimodal", "CLIPScore.update"): "self source target",
    ("torchmetrics.multimodal", "CLIPImageQualityAssessment.__init__"): (
        "self model_name_or_path data_range prompts kwargs"
    ),
    ("torchmetrics.multimodal", "CLIPImageQualityAssessment.update"): "self images",
    ("ImageReward", "load"): "name device download_root med_config",
    ("ImageReward.ImageReward", "ImageReward.score"): "self prompt image",
}
# torchmetrics 1.9.0, torchmetrics/functional/multimodal/clip_iqa.py
REAL_ASPECTS = {
    *("quality", "brightness", "noisiness", "colorfullness", "sharpness", "contrast", "complexity", "natural"),
    *("happy", "scary", "new", "warm", "real", "beautiful", "lonely", "relaxing"),
}
LIBRARIES = {"clean-fid": "fid", "clip-score": "clip", "clip-iqa": "clip", "image-reward": "image-reward"}


class Calls:
    """Binds each call to the real parameters, refuses what they do not have, and keeps it."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, Any]]] = []

    def take(self, module: str, name: str, *args: Any, **keywords: Any) -> None:
        kinds = [
            inspect.Parameter(
                parameter,
                inspect.Parameter.VAR_KEYWORD if parameter == "kwargs" else inspect.Parameter.POSITIONAL_OR_KEYWORD,
            )
            for parameter in REAL[module, name].split()
            if parameter != "self"
        ]
        self.seen.append((name, inspect.Signature(kinds).bind_partial(*args, **keywords).arguments))

    def of(self, name: str) -> list[dict[str, Any]]:
        return [arguments for called, arguments in self.seen if called == name]


@pytest.fixture
def metrics(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    return published


@pytest.fixture
def lists(metrics: ModuleType) -> ModuleType:
    return prompts


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """All the libraries are there, as fakes."""
    made = Calls()
    for name, module in {
        "cleanfid": ModuleType("cleanfid"),
        "cleanfid.fid": fake_clean_fid(made),
        "torchmetrics": ModuleType("torchmetrics"),
        "torchmetrics.multimodal": fake_torchmetrics(made),
        "ImageReward": fake_image_reward(made),
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    return made


def fake_clean_fid(calls: Calls) -> ModuleType:
    """Knows the statistics "mjhq"."""
    module: Any = ModuleType("cleanfid.fid")

    def compute_fid(*args: Any, **keywords: Any) -> np.float64:
        calls.take("cleanfid.fid", "compute_fid", *args, **keywords)
        return np.float64(6.13)

    def test_stats_exists(*args: Any, **keywords: Any) -> bool:
        calls.take("cleanfid.fid", "test_stats_exists", *args, **keywords)
        return bool(args[0] == "mjhq")

    module.compute_fid, module.test_stats_exists = compute_fid, test_stats_exists
    return module


def fake_torchmetrics(calls: Calls) -> ModuleType:
    """Scores are the red of each picture; the aspects are it plus 0, 1, 2, 3, over 255."""
    module: Any = ModuleType("torchmetrics.multimodal")
    place = "torchmetrics.multimodal"

    class CLIPScore:
        def __init__(self, *args: Any, **keywords: Any) -> None:
            calls.take(place, "CLIPScore.__init__", *args, **keywords)
            self.scores: list[float] = []

        def to(self, device: str) -> "CLIPScore":
            calls.seen.append(("to", {"device": device}))
            return self

        def update(self, *args: Any) -> None:
            calls.take(place, "CLIPScore.update", *args)
            pictures, texts = args
            assert len(pictures) == len(texts)
            self.scores += [float(picture[0, 0, 0]) for picture in pictures]

        def compute(self) -> torch.Tensor:
            return torch.tensor(self.scores, dtype=torch.float64).mean()

    class CLIPImageQualityAssessment(CLIPScore):
        def __init__(self, *args: Any, **keywords: Any) -> None:
            calls.take(place, "CLIPImageQualityAssessment.__init__", *args, **keywords)
            self.scores = []

        def update(self, *args: Any) -> None:
            calls.take(place, "CLIPImageQualityAssessment.update", *args)
            self.scores += [float(picture[0, 0, 0]) for picture in args[0]]

        def compute(self) -> Any:
            red = torch.tensor(self.scores, dtype=torch.float64)
            return {aspect: (red + shift) / 255 for shift, aspect in enumerate(ASPECTS)}

    module.CLIPScore, module.CLIPImageQualityAssessment = CLIPScore, CLIPImageQualityAssessment
    return module


def fake_image_reward(calls: Calls) -> ModuleType:
    """A reward is a tenth of the picture's red; like the real one, a float for one picture and a list for several."""
    module: Any = ModuleType("ImageReward")

    def score(*args: Any) -> Any:
        calls.take("ImageReward.ImageReward", "ImageReward.score", *args)
        assert not torch.is_grad_enabled()
        rewards = [np.asarray(Image.open(path))[0, 0, 0] / 10 for path in args[1]]
        return rewards if len(rewards) > 1 else rewards[0]

    def load(*args: Any, **keywords: Any) -> SimpleNamespace:
        calls.take("ImageReward", "load", *args, **keywords)
        return SimpleNamespace(score=score)

    module.load = load
    return module


def paint(folder: Path, names: list[str], *, height: int = 4) -> Path:
    """Pictures whose red is 10, 20, 30 … in the order of the names."""
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names, 1):
        Image.new("RGB", (6, height), (10 * number, 0, 255)).save(folder / f"{name}.png")
    return folder


def sampled(lists: ModuleType, metrics: ModuleType, top: Path, names: list[str], count: int) -> Any:
    (top / "prompts.txt").write_text("".join(f"prompt {number}\n" for number in range(count)))
    folder = paint(top / "pictures", names)
    return metrics.Sample(folder, tuple(lists.match_pictures(folder, lists.LINES.load(top / "prompts.txt"))))


def write_official(path: Path, name: str, count: int) -> Path:
    """A list in the format of its repository, with other prompts."""
    texts = [f"picture number {number}" for number in range(count)]
    if name == "lines":
        path.write_text("\n\n".join(texts))
    elif name == "image-reward":
        entries = [{"id": f"{number:06d}-0001", "prompt": text} for number, text in enumerate(texts)]
        path.write_text(json.dumps(entries))
    elif name == "mjhq-30k":
        path.write_text(json.dumps({f"h{i}": {"category": "art", "prompt": text} for i, text in enumerate(texts)}))
    elif name == "parti":
        path.write_text("\n".join(["Prompt\tCategory\tChallenge\tNote", *(f"{text}\tArts\tBasic\t" for text in texts)]))
    elif name == "geneval":
        path.write_text("\n".join(json.dumps({"tag": "counting", "include": [], "prompt": text}) for text in texts))
    else:
        path.mkdir()
        for number, text in enumerate(texts):
            (path / f"{number}.txt").write_text(f"{text}\n")
    return path


OFFICIAL = {"lines": 3, "image-reward": 100, "mjhq-30k": 30_000, "parti": 1632, "geneval": 553, "dpg-bench": 1065}


@pytest.mark.parametrize(("name", "count"), OFFICIAL.items())
def test_an_official_list_is_read_whole(lists: ModuleType, tmp_path: Path, name: str, count: int) -> None:
    prompts = lists.LISTS[name].load(write_official(tmp_path / "list", name, count))
    assert sorted(prompt.text for prompt in prompts) == sorted(f"picture number {number}" for number in range(count))
    assert len({prompt.id for prompt in prompts}) == count


@pytest.mark.parametrize(("name", "count"), [(name, count) for name, count in OFFICIAL.items() if name != "lines"])
def test_a_list_of_another_length_is_refused(lists: ModuleType, tmp_path: Path, name: str, count: int) -> None:
    path = write_official(tmp_path / "list", name, count - 1)
    with pytest.raises(InvalidRequest, match=rf"has {count - 1} prompts, {name} has {count}; download https://"):
        lists.LISTS[name].load(path)


@pytest.mark.parametrize("name", ["image-reward", "mjhq-30k", "parti", "geneval"])
def test_a_file_of_another_format_is_refused(lists: ModuleType, tmp_path: Path, name: str) -> None:
    (tmp_path / "list").write_text("a cat\na dog\n")
    with pytest.raises(InvalidRequest, match=r"is not .*download https://"):
        lists.LISTS[name].load(tmp_path / "list")


def test_a_prompt_keeps_the_quotation_marks_it_begins_with(lists: ModuleType, tmp_path: Path) -> None:
    path = write_official(tmp_path / "list", "parti", 1631)
    path.write_text(path.read_text() + '\n"G I G" on a wall\tArts\tBasic\t')
    assert lists.PARTI.load(path)[-1] == ("01631", '"G I G" on a wall')


def test_ids_that_repeat_are_refused(lists: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "list").write_text(json.dumps([{"id": "a", "prompt": "x"}] * 100))
    with pytest.raises(InvalidRequest, match="1 ids more than once, the first is 'a'"):
        lists.IMAGE_REWARD.load(tmp_path / "list")


def test_pictures_go_to_the_prompts_they_are_named_by(lists: ModuleType, tmp_path: Path) -> None:
    prompts = [lists.Prompt("x_1", "one"), lists.Prompt("x", "two")]
    folder = paint(tmp_path / "pictures", ["x_0", "x_1_0", "x_1_1", "x_2"])
    matched = lists.match_pictures(folder, prompts)
    assert [(prompt.text, [path.stem for path in paths]) for prompt, paths in matched] == [
        ("one", ["x_1_0", "x_1_1"]),
        ("two", ["x_0", "x_2"]),
    ]


def test_missing_and_extra_pictures_are_counted(lists: ModuleType, metrics: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest) as refused:
        sampled(lists, metrics, tmp_path, ["00000", "00003", "cat", "dog"], 4)
    assert "2 of 4 prompts have no picture, the first is 00001.png" in str(refused.value)
    assert "2 pictures have no prompt, the first is cat.png" in str(refused.value)


def test_prompts_with_unequal_numbers_of_pictures_are_refused(
    lists: ModuleType, metrics: ModuleType, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequest, match="1 prompts do not have 2 pictures as the first has, 00001 has 1"):
        sampled(lists, metrics, tmp_path, ["00000_0", "00000_1", "00001_0"], 2)


def test_clean_fid_compares_two_folders(metrics: ModuleType, calls: Calls, tmp_path: Path) -> None:
    folder, reference = paint(tmp_path / "made", ["a", "b"]), paint(tmp_path / "real", ["c", "d"])
    sample = metrics.Sample(folder, reference=str(reference))
    assert metrics.METRICS["clean-fid"].measure(sample, metrics.Options("cpu", 2)) == {"fid": 6.13}
    assert calls.of("compute_fid") == [
        {"fdir1": str(folder), "fdir2": str(reference), "use_dataparallel": False, **CLEAN}
    ]


def test_clean_fid_compares_with_kept_statistics(metrics: ModuleType, calls: Calls, tmp_path: Path) -> None:
    folder = paint(tmp_path / "made", ["a", "b"])
    metrics.METRICS["clean-fid"].measure(metrics.Sample(folder, reference="MJHQ"), metrics.Options("cpu", 2))
    assert calls.of("test_stats_exists") == [{"name": "mjhq", "mode": "clean", "model_name": "inception_v3"}]
    kept = {"dataset_name": "mjhq", "dataset_split": "custom"}
    assert calls.of("compute_fid") == [{"fdir1": str(folder), "use_dataparallel": False, **kept, **CLEAN}]


def test_clean_fid_refuses_a_reference_that_is_not_there(metrics: ModuleType, calls: Calls, tmp_path: Path) -> None:
    folder = paint(tmp_path / "made", ["a", "b"])
    for reference, message in (("", "give --reference"), ("nowhere", "neither a folder nor statistics")):
        with pytest.raises(InvalidRequest, match=message):
            metrics.METRICS["clean-fid"].measure(metrics.Sample(folder, reference=reference), metrics.Options("cpu", 2))
    assert calls.of("compute_fid") == []


def test_clean_fid_refuses_pictures_that_no_one_counted(metrics: ModuleType, calls: Calls, tmp_path: Path) -> None:
    folder = paint(tmp_path / "made", ["a", "b"])
    paint(folder / "below", ["c"])
    with pytest.raises(InvalidRequest, match="1 files in folders below"):
        metrics.METRICS["clean-fid"].measure(metrics.Sample(folder, reference=str(folder)), metrics.Options("cpu", 2))


def test_clip_score_is_the_mean_over_all_batches(
    lists: ModuleType, metrics: ModuleType, calls: Calls, tmp_path: Path
) -> None:
    sample = sampled(lists, metrics, tmp_path, [f"{number:05d}" for number in range(5)], 5)
    found = metrics.METRICS["clip-score"].measure(sample, metrics.Options("cpu", 2))
    assert found == {"clip_score": 30}
    assert calls.of("CLIPScore.__init__") == [{"model_name_or_path": "openai/clip-vit-base-patch16"}]
    assert calls.of("to") == [{"device": "cpu"}]
    updates = calls.of("CLIPScore.update")
    assert [update["target"] for update in updates] == [
        ["prompt 0", "prompt 1"],
        ["prompt 2", "prompt 3"],
        ["prompt 4"],
    ]
    assert {(tuple(x.shape), x.dtype) for update in updates for x in update["source"]} == {((3, 4, 6), torch.uint8)}
    assert [int(x[0, 0, 0]) for update in updates for x in update["source"]] == [10, 20, 30, 40, 50]


def test_clip_score_takes_another_model(lists: ModuleType, metrics: ModuleType, calls: Calls, tmp_path: Path) -> None:
    sample = sampled(lists, metrics, tmp_path, ["00000"], 1)
    metrics.METRICS["clip-score"].measure(sample, metrics.Options("cpu", 2, "openai/clip-vit-large-patch14"))
    assert calls.of("CLIPScore.__init__") == [{"model_name_or_path": "openai/clip-vit-large-patch14"}]


def test_clip_iqa_reports_four_aspects_in_percent(
    lists: ModuleType, metrics: ModuleType, calls: Calls, tmp_path: Path
) -> None:
    sample = sampled(lists, metrics, tmp_path, ["00000", "00001"], 2)
    paint(sample.folder, ["00000"], height=9)
    found = metrics.METRICS["clip-iqa"].measure(sample, metrics.Options("cpu", 2))
    wanted = {f"clip_iqa_{aspect}": 100 * (15 + shift) / 255 for shift, aspect in enumerate(ASPECTS)}
    assert found == pytest.approx(wanted, abs=CLOSE)
    assert calls.of("CLIPImageQualityAssessment.__init__") == [
        {"model_name_or_path": "clip_iqa", "data_range": 255, "prompts": ASPECTS}
    ]
    shapes = [tuple(update["images"].shape) for update in calls.of("CLIPImageQualityAssessment.update")]
    assert shapes == [(1, 3, 9, 6), (1, 3, 4, 6)]


def test_clip_iqa_leaves_the_scale_to_another_models_preprocessor(
    lists: ModuleType, metrics: ModuleType, calls: Calls, tmp_path: Path
) -> None:
    sample = sampled(lists, metrics, tmp_path, ["00000"], 1)
    metrics.METRICS["clip-iqa"].measure(sample, metrics.Options("cpu", 2, "openai/clip-vit-base-patch16"))
    (made,) = calls.of("CLIPImageQualityAssessment.__init__")
    assert (made["model_name_or_path"], made["data_range"]) == ("openai/clip-vit-base-patch16", 1)


def test_the_aspects_are_torchmetrics_own(metrics: ModuleType) -> None:
    assert set(metrics.ASPECTS) <= REAL_ASPECTS


@pytest.mark.parametrize("each", [1, 2])
def test_image_reward_is_the_mean_times_100(
    lists: ModuleType, metrics: ModuleType, calls: Calls, tmp_path: Path, each: int
) -> None:
    names = [f"{number:05d}_{copy}" for number in range(3) for copy in range(each)]
    sample = sampled(lists, metrics, tmp_path, names, 3)
    found = metrics.METRICS["image-reward"].measure(sample, metrics.Options("cpu", 2))
    assert found == pytest.approx({"image_reward": 100 * (1 + 3 * each) / 2}, abs=CLOSE)
    assert calls.of("load") == [{"name": "ImageReward-v1.0", "device": "cpu"}]
    assert calls.of("ImageReward.score") == [
        {"prompt": prompt.text, "image": [str(path) for path in paths]} for prompt, paths in sample.pictured
    ]


@pytest.mark.parametrize(("name", "extra"), LIBRARIES.items())
def test_a_missing_library_names_its_extra(
    lists: ModuleType, metrics: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, extra: str
) -> None:
    metric = metrics.METRICS[name]
    monkeypatch.setitem(sys.modules, metric.module.partition(".")[0], None)
    monkeypatch.setitem(sys.modules, metric.module, None)
    sample = sampled(lists, metrics, tmp_path, ["00000"], 1)
    compared = metrics.Sample(sample.folder, sample.pictured, str(sample.folder))
    with pytest.raises(MissingDependency, match=rf"pip install 'ilf-trt\[{extra}\]'"):
        metric.measure(compared, metrics.Options("cpu", 2))


def test_torchmetrics_without_transformers_names_its_extra(
    lists: ModuleType, metrics: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", ModuleType("torchmetrics"))
    monkeypatch.setitem(sys.modules, "torchmetrics.multimodal", ModuleType("torchmetrics.multimodal"))
    sample = sampled(lists, metrics, tmp_path, ["00000"], 1)
    with pytest.raises(MissingDependency, match=r"has no CLIPScore; pip install 'ilf-trt\[clip\]'"):
        metrics.METRICS["clip-score"].measure(sample, metrics.Options("cpu", 2))


@pytest.mark.parametrize("name", ["clip-score", "clip-iqa", "image-reward"])
def test_a_metric_of_prompts_asks_for_them(metrics: ModuleType, calls: Calls, tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidRequest, match="needs --prompts"):
        metrics.METRICS[name].measure(metrics.Sample(paint(tmp_path / "made", ["a"])), metrics.Options("cpu", 2))


def test_the_command_appends_a_row(
    metrics: ModuleType, calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "append_rows", record.Records(tmp_path / "results").append)
    prompts = write_official(tmp_path / "list", "image-reward", 100)
    folder = paint(tmp_path / "pictures", [f"{number:06d}-0001" for number in range(100)][:25])
    for number in range(25, 100):
        Image.new("RGB", (6, 4), (0, 0, 0)).save(folder / f"{number:06d}-0001.png")
    tokens = ["--metric", "image-reward", "--pictures", str(folder), "--prompts", str(prompts)]
    metrics.main(tokens)
    metrics.main(tokens)
    with (tmp_path / "results" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1
    wanted = {"metric": "image-reward", "score": "image_reward", "value": "325.0", "better": "higher"}
    assert wanted.items() <= rows[0].items()
    assert (rows[0]["prompts"], rows[0]["pictures_count"]) == ("image-reward", "100")


def test_the_command_refuses_in_one_line(
    metrics: ModuleType, calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = paint(tmp_path / "pictures", ["a"])
    with pytest.raises(SystemExit) as left:
        metrics.main(["--metric", "clean-fid", "--pictures", str(folder)])
    assert left.value.code == 2
    assert "give --reference" in capsys.readouterr().err


@pytest.mark.parametrize(("module", "name"), REAL)
@pytest.mark.filterwarnings("ignore")
def test_the_real_library_takes_what_the_fake_takes(module: str, name: str) -> None:
    found: Any = pytest.importorskip(module, exc_type=ImportError)
    for part in name.split("."):
        found = getattr(found, part)
    assert " ".join(inspect.signature(found).parameters) == REAL[module, name]
