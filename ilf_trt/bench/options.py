"""What a benchmark is asked to measure."""

import re
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from ilf_trt.contract.device import ordinal_of
from ilf_trt.errors import InvalidRequest, told

from .row import Boundary, Rival
from .scores import Score

DEFAULT_STEPS = 20
DEFAULT_WITHIN = 0.02
DEFAULT_MAX_S = 120.0
MOST_BATCH = 1 << 10
MOST_PICTURES = 1 << 14
PLAN = re.compile(r"[0-9]{1,4}:[a-z0-9,:]{1,200}")


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """Everything that changes what a benchmark measures.

    `against` names the rivals; without any, the engines are alone. `steps` are those of the plain rows; `ilf_steps` and
    `feedback` None take the bundle's plan. `plans` are more plans of the engines, as `STEPS:FEEDBACK`. `prompts` and
    `labels` are what the pictures show, without either the classes of the model. Agreement is measured on
    `quality_pictures`, at least on one batch; `scores` are taken of the same pictures. `within` is the half width of
    the wanted interval of a ratio, as a share; `max_s` the most seconds that the turns of a batch take.
    `torch_precision` None is fp32 on a CPU, fp16 on a GPU.
    """

    bundle: Path
    checkpoint: str | None = None
    against: tuple[Rival, ...] = ()
    device: str = "cpu"
    engine: str | None = None
    batches: tuple[int, ...] = (1,)
    boundary: Boundary = Boundary.DENOISE
    steps: int = DEFAULT_STEPS
    ilf_steps: int | None = None
    feedback: str | None = None
    plans: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    size: tuple[int, int] | None = None
    seed: int = 0
    guidance_scale: float | None = None
    torch_precision: str | None = None
    threads: int = 0
    quality_pictures: int = 0
    scores: tuple[Score, ...] = ()
    within: float = DEFAULT_WITHIN
    max_s: float = DEFAULT_MAX_S

    def check(self) -> None:
        """Raise InvalidRequest for options that cannot be measured, before anything is loaded."""
        ordinal_of(self.device)
        if self.against and self.checkpoint is None:
            raise InvalidRequest(
                "--against runs PyTorch on the checkpoint that the bundle was built from; pass it: --checkpoint CKPT"
            )
        for name, value in (("--within", self.within), ("--max-seconds", self.max_s)):
            if not isfinite(value) or value <= 0:
                raise InvalidRequest(f"{name} is {value:g}, it must be positive and finite")
        if not self.batches or len(set(self.batches)) != len(self.batches):
            raise InvalidRequest(f"--batch is {', '.join(map(str, self.batches)) or 'empty'}; give each number once")
        for batch in self.batches:
            if not 1 <= batch <= MOST_BATCH:
                raise InvalidRequest(f"--batch is {batch}, it must be 1 to {MOST_BATCH}")
        for plan in self.plans:
            if not PLAN.fullmatch(plan):
                raise InvalidRequest(f"--plans names {told(plan)}, expected STEPS:FEEDBACK, such as 10:outer:2")
        if not 0 <= self.quality_pictures <= MOST_PICTURES:
            raise InvalidRequest(f"--quality-pictures is {self.quality_pictures}, it must be 0 to {MOST_PICTURES}")
        if self.scores and not self.prompts:
            raise InvalidRequest("--scores compares pictures with their prompts; pass --prompt TEXT, once or more")
        if self.prompts and self.labels:
            raise InvalidRequest("--prompt and --labels are both given; a model takes one of them")

    @property
    def eager_precision(self) -> str:
        """The dtype that torch's rows run in."""
        return self.torch_precision or ("fp32" if self.device == "cpu" else "fp16")
