"""The checkpoints that come with the package, by the names that stand for their folders."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Packaged:
    """A checkpoint in the package; `guidance_scale` is what its pictures are best with."""

    name: str
    subfolder: str
    guidance_scale: float

    @property
    def folder(self) -> Path:
        return Path(str(files("ilf_trt") / self.subfolder))


DEMO, EMOJI = Packaged("demo", "demo", 1.5), Packaged("demo-emoji", "demo_emoji", 4.0)


def find_packaged(name: str) -> Packaged | None:
    """What a name stands for; None when it is not one of them, or a folder of that name lies here."""
    known = {each.name: each for each in (DEMO, EMOJI)}.get(name)
    return None if known is None or Path(name).is_dir() else known
