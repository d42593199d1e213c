"""The process that scores pictures; the libraries of the scores want packages that neither side should load.

python -m ilf_trt.bench.score_process
"""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ilf_trt.errors import MissingDependency

from .answering import serve
from .inputs import read_latents
from .scores import Score

CLIP_MODEL, REWARD_MODEL = "openai/clip-vit-base-patch16", "ImageReward-v1.0"

Scorer = Callable[[Any, str], float]
"""One picture, uint8 (H, W, 3), and its prompt -> its score."""


class ScoreProcess:
    """Scorers that stay loaded."""

    def __init__(self) -> None:
        self._scorers: dict[Score, Scorer] = {}

    def facts(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    def load(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Load the libraries and their weights; raises MissingDependency, which names the extra."""
        for score in map(Score, request["scores"]):
            try:
                self._scorers[score] = LOADERS[score](request["device"])
            except ImportError as error:
                raise MissingDependency(
                    f"--scores {score} needs its library ({error}); pip install 'ilf-trt[{score.extra}]'"
                ) from error
        return {}

    def score(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The score of every picture, by the name of the score."""
        pictures = [np.repeat(one, 3, -1) if one.shape[-1] == 1 else one for one in read_latents(Path(request["path"]))]
        pairs = list(zip(pictures, request["prompts"], strict=True))
        return {name.value: [scorer(*pair) for pair in pairs] for name, scorer in self._scorers.items()}


def clip_scorer(device: str) -> Scorer:
    """The CLIP score of torchmetrics."""
    torch, multimodal = import_module("torch"), import_module("torchmetrics.multimodal")
    metric = multimodal.CLIPScore(model_name_or_path=CLIP_MODEL).to(device)

    def score(picture: Any, prompt: str) -> float:
        with torch.inference_mode():
            return float(metric([torch.from_numpy(picture).permute(2, 0, 1).to(device)], [prompt]))

    return score


def image_reward_scorer(device: str) -> Scorer:
    """The reward of ImageReward's own package."""
    torch, library, image = import_module("torch"), import_module("ImageReward"), import_module("PIL.Image")
    model = library.load(REWARD_MODEL, device=device)

    def score(picture: Any, prompt: str) -> float:
        with torch.no_grad():
            return float(model.score(prompt, [image.fromarray(picture)]))

    return score


LOADERS: dict[Score, Callable[[str], Scorer]] = {Score.CLIP: clip_scorer, Score.IMAGE_REWARD: image_reward_scorer}


def main() -> int:
    process = ScoreProcess()
    return serve({name: getattr(process, name) for name in ("facts", "load", "score")})


if __name__ == "__main__":
    sys.exit(main())
