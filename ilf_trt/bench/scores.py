"""Published scores of pictures by their prompts, each behind an extra of its own."""

from dataclasses import dataclass
from enum import StrEnum

from ilf_trt.errors import InvalidRequest, told


class Score(StrEnum):
    """A score, by its name on the command line; more is better.

    `clip-score` is 100 times the cosine of picture and prompt in CLIP, `image-reward` is ImageReward's reward. Each
    library downloads its own weights.
    """

    CLIP = "clip-score"
    IMAGE_REWARD = "image-reward"

    @property
    def extra(self) -> str:
        """The extra that brings the library."""
        return "clip" if self is Score.CLIP else "image-reward"

    @classmethod
    def parse_all(cls, text: str) -> "tuple[Score, ...]":
        """`"clip-score,image-reward"` -> both, each once; raises InvalidRequest for another name."""
        names = [name.strip() for name in text.split(",")]
        for name in names:
            if name not in tuple(cls):
                raise InvalidRequest(f"--scores names {told(name)}, it takes {', '.join(cls)}")
        return tuple(score for score in cls if score.value in names)


@dataclass(frozen=True, slots=True)
class PictureScore:
    """The mean score of a row's pictures, and its mean difference from the base line's, picture by picture.

    `low` and `high` are the 95 % bounds of that difference; all three are None for the base line itself.
    """

    name: str
    mean: float
    difference: float | None = None
    low: float | None = None
    high: float | None = None
