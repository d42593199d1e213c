"""Published metrics of a folder of pictures, each behind an extra: clean-fid, CLIP score, CLIP-IQA, ImageReward.

    python -m benchmarks.metrics.published --metric image-reward --pictures FOLDER --prompts benchmark-prompts.json
    python -m benchmarks.metrics.published --metric clip-score --pictures FOLDER --prompts prompts.txt
    python -m benchmarks.metrics.published --metric clip-iqa --pictures FOLDER --prompts benchmark-prompts.json
    python -m benchmarks.metrics.published --metric clean-fid --pictures FOLDER --prompts meta_data.json \\
        --reference FOLDER

The name of a picture is the id of its prompt; docs/metrics.md has examples. Each library downloads its own weights.
ImageReward's loader opens its checkpoint with `torch.load`, which is pickle. Since torch 2.6, `torch.load` reads
tensors alone; an older torch runs any code in the file. clean-fid's Inception is TorchScript, which is code too, in
/tmp/inception-2015-12-05.pt: check the owner of that file on a shared machine.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.metrics.prompts import (
    IMAGE_REWARD,
    LINES,
    LISTS,
    MJHQ_30K,
    Pictured,
    PromptList,
    match_pictures,
    pictures_in,
)
from benchmarks.record import append_rows
from ilf_trt.errors import IlfError, InvalidRequest, MissingDependency

ASPECTS = ("quality", "noisiness", "colorfullness", "natural")  # the paper's Good, Noisy, Colorful, Natural
CLIP_IQA = "clip_iqa"  # the model of CLIP-IQA's paper, which has no preprocessor
PERCENT = 100  # the paper prints ImageReward and CLIP-IQA times 100


class Better(Enum):
    """Which way a metric improves."""

    HIGHER = "higher"
    LOWER = "lower"


@dataclass(frozen=True, slots=True)
class Options:
    """How a metric runs; an empty `model` means the default of the metric."""

    device: str
    batch: int
    model: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """A folder of pictures, their prompts, and the reference to compare them with; the last two may be empty."""

    folder: Path
    pictured: tuple[Pictured, ...] = ()
    reference: str = ""

    def pairs(self) -> list[tuple[Path, str]]:
        """Every picture with the text of its prompt."""
        return [(path, prompt.text) for prompt, paths in self.pictured for path in paths]


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric: its library (`package` on PyPI, in our `extra`), its official prompts, and its function.

    `module` must have all of `names`. A `reference` is a folder of pictures or the library's own statistics; with one,
    prompts only check that no picture is missing.
    """

    name: str
    package: str
    extra: str
    module: str
    names: tuple[str, ...]
    prompts: PromptList
    better: Better
    model: str
    reference: bool
    score: Callable[[Any, Sample, Options], dict[str, float]]

    def measure(self, sample: Sample, options: Options) -> dict[str, float]:
        """Raises MissingDependency without the extra, InvalidRequest without the prompts or the reference it needs."""
        if self.reference and not sample.reference:
            raise InvalidRequest(f"{self.name} compares with other pictures; give --reference")
        if not self.reference and not sample.pictured:
            raise InvalidRequest(f"{self.name} needs --prompts: {self.prompts.file}, {self.prompts.url}")
        complete = Options(options.device, options.batch, options.model or self.model)
        return self.score(self._library(), sample, complete)

    def _library(self) -> Any:
        install = f"pip install 'ilf-trt[{self.extra}]', best into an environment of its own"
        try:
            module = import_module(self.module)
        except ImportError as error:
            raise MissingDependency(f"{self.name} needs {self.package} ({error}); {install}") from error
        if absent := [name for name in self.names if not hasattr(module, name)]:
            raise MissingDependency(f"{self.name}: {self.module} has no {', '.join(absent)}; {install}")
        return module


def clean_fid(fid: Any, sample: Sample, options: Options) -> dict[str, float]:
    """Fréchet Inception distance to a folder, or to the statistics of `fid.make_custom_stats(NAME, FOLDER)`."""
    import torch

    nested = [path for path in sample.folder.rglob("*") if path.is_file() and path.parent != sample.folder]
    if nested:
        raise InvalidRequest(
            f"{sample.folder} has {len(nested)} files in folders below, which clean-fid would count too; move them away"
        )
    if len(pictures_in(sample.folder)) < 2:
        raise InvalidRequest(f"{sample.folder} has one picture; a covariance needs two, and FID some thousands")
    settings = {
        "mode": "clean",
        "model_name": options.model,
        "batch_size": options.batch,
        "device": torch.device(options.device),
        "use_dataparallel": False,  # else clean-fid refuses a second GPU
    }
    if Path(sample.reference).is_dir():
        return {"fid": float(fid.compute_fid(str(sample.folder), sample.reference, **settings))}
    name = sample.reference.lower()  # the library saves names in lower case, and does not lower them to look them up
    if not fid.test_stats_exists(name, "clean", options.model):
        raise InvalidRequest(
            f"--reference {sample.reference} is neither a folder nor statistics of clean-fid; give one of them"
        )
    statistics = {"dataset_name": name, "dataset_split": "custom"}
    return {"fid": float(fid.compute_fid(str(sample.folder), **statistics, **settings))}


def clip_score(multimodal: Any, sample: Sample, options: Options) -> dict[str, float]:
    """The mean over pictures of 100 cos(picture, prompt); CLIP cuts a prompt after 77 tokens."""
    import torch

    metric = multimodal.CLIPScore(model_name_or_path=options.model).to(options.device)
    with torch.inference_mode():
        for chunk in _chunks(sample.pairs(), options.batch):
            pictures = [_pixels(path).to(options.device) for path, _ in chunk]
            metric.update(pictures, [text for _, text in chunk])
        return {"clip_score": float(metric.compute())}


def clip_iqa(multimodal: Any, sample: Sample, options: Options) -> dict[str, float]:
    """The mean over pictures of the similarity to "Good photo." against "Bad photo." …, in percent.

    Noisiness is "Clean photo." against "Noisy photo.", so it also rises with quality.
    """
    import torch

    scale = 255 if options.model == CLIP_IQA else 1  # for any other CLIP, its own preprocessor divides by 255
    metric = multimodal.CLIPImageQualityAssessment(
        model_name_or_path=options.model, data_range=scale, prompts=ASPECTS
    ).to(options.device)
    for path, _ in sample.pairs():  # one by one: pictures may differ in size, and the model takes them unresized
        metric.update(_pixels(path)[None].to(options.device))
    with torch.inference_mode():
        scores = metric.compute()
    return {f"clip_iqa_{aspect}": PERCENT * float(scores[aspect].double().mean()) for aspect in ASPECTS}


def image_reward(library: Any, sample: Sample, options: Options) -> dict[str, float]:
    """The mean over prompts of the mean reward of a prompt's pictures, times 100."""
    import torch

    model = library.load(options.model, device=options.device)
    with torch.no_grad():
        rewards = [
            np.mean(model.score(prompt.text, [str(path) for path in paths])) for prompt, paths in sample.pictured
        ]
    return {"image_reward": PERCENT * float(np.mean(rewards))}


METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            "clean-fid",
            package="clean-fid",
            extra="fid",
            module="cleanfid.fid",
            names=("compute_fid", "test_stats_exists"),
            prompts=MJHQ_30K,
            better=Better.LOWER,
            model="inception_v3",
            reference=True,
            score=clean_fid,
        ),
        Metric(
            "clip-score",
            package="torchmetrics",
            extra="clip",
            module="torchmetrics.multimodal",
            names=("CLIPScore",),
            prompts=LINES,
            better=Better.HIGHER,
            model="openai/clip-vit-base-patch16",
            reference=False,
            score=clip_score,
        ),
        Metric(
            "clip-iqa",
            package="torchmetrics",
            extra="clip",
            module="torchmetrics.multimodal",
            names=("CLIPImageQualityAssessment",),
            prompts=IMAGE_REWARD,
            better=Better.HIGHER,
            model=CLIP_IQA,
            reference=False,
            score=clip_iqa,
        ),
        Metric(
            "image-reward",
            package="image-reward",
            extra="image-reward",
            module="ImageReward",
            names=("load",),
            prompts=IMAGE_REWARD,
            better=Better.HIGHER,
            model="ImageReward-v1.0",
            reference=False,
            score=image_reward,
        ),
    )
}


def rows_of(metric: Metric, sample: Sample, prompts: str, options: Options) -> list[dict[str, Any]]:
    """A row for every number of a metric; `prompts` names the list."""
    return [
        {
            "metric": metric.name,
            "score": name,
            "value": round(value, 4),
            "better": metric.better.value,
            "pictures": str(sample.folder),
            "pictures_count": len(pictures_in(sample.folder)),
            "prompts": prompts,
            "reference": sample.reference,
            "model": options.model or metric.model,
            "package": f"{metric.package}={_version(metric.package)}",
        }
        for name, value in metric.measure(sample, options).items()
    ]


def _pixels(path: Path) -> Any:
    import torch

    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)  # uint8 (3, H, W)


def _chunks(pairs: list[tuple[Path, str]], batch: int) -> Iterator[list[tuple[Path, str]]]:
    for begin in range(0, len(pairs), batch):
        yield pairs[begin : begin + batch]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def main(arguments: list[str] | None = None) -> None:
    tokens = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--metric", required=True, choices=list(METRICS))
    parser.add_argument("--pictures", required=True, type=Path, help="a folder; ID.png, or ID_0.png, ID_1.png …")
    parser.add_argument("--prompts", type=Path, help="the published file of the list")
    parser.add_argument("--list", choices=list(LISTS), help="name of the list; by default the list of the metric")
    parser.add_argument("--reference", default="", help="clean-fid: a folder, or the name of its statistics")
    parser.add_argument("--model", default="", help="an id or file for the library of the metric; by default its own")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 …")
    parser.add_argument("--batch", type=int, default=16, help="pictures at once")
    parser.add_argument("--name", default="metrics", help="CSV to append to under benchmarks/results/")
    options = parser.parse_args(tokens)
    metric = METRICS[options.metric]
    known = LISTS[options.list] if options.list else metric.prompts
    try:
        pictured = match_pictures(options.pictures, known.load(options.prompts)) if options.prompts else []
        sample = Sample(options.pictures, tuple(pictured), options.reference)
        settings = Options(options.device, options.batch, options.model)
        rows = rows_of(metric, sample, known.name if options.prompts else "", settings)
    except IlfError as error:
        parser.error(str(error))
    for row in rows:
        print(f"{row['score']} {row['value']} ({row['better']} is better)")
    command = shlex.join(["python", "-m", "benchmarks.metrics.published", *tokens])
    print(
        append_rows(options.name, command, rows, key=("metric", "score", "pictures", "prompts", "reference", "model"))
    )


if __name__ == "__main__":
    main()
