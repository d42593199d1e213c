"""How near the latents of every row are to eager PyTorch's from the same noise, and what they look like."""

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from ilf_trt.contract.plan import StepPlan
from ilf_trt.errors import IlfError, one_line

from .inputs import decibels, png_of, read_latents, relative_difference, write_latents
from .measured import Measured
from .result import Agreement
from .row import Side
from .scores import PictureScore
from .statistics import mean_interval
from .worker import Worker

log = logging.getLogger(__name__)

Arrays = dict[StepPlan, Any]


class PictureCheck:
    """Latents of rows and of references, in chunks of one batch; what fails here costs no row its times.

    `plain` is the plan of the base line, `long` the one with many more steps.
    """

    def __init__(
        self,
        workers: Mapping[Side, Worker],
        folder: Path,
        plain: StepPlan,
        long: StepPlan,
        *,
        scorer: Worker | None = None,
        prompts: Sequence[str] = (),
        batch: int = 1,
    ) -> None:
        """`scorer` scores the pictures by `prompts`, which a chunk of `batch` pictures takes in turn."""
        self._workers = workers
        self._scorer, self._prompts, self._batch = scorer, prompts, batch
        self._folder = folder
        self._plain, self._long = plain, long
        self._latents: dict[str, list[Any]] = defaultdict(list)
        self._references: dict[StepPlan, list[Any]] = defaultdict(list)

    def add_chunk(self, measured: list[Measured]) -> None:
        """Take the latents of all rows and references from the inputs that the processes have now."""
        for each in measured:
            self._take(self._latents[each.row.slug], lambda path, each=each: self._ask_row(each, path))  # type: ignore[misc]
        if Side.TORCH in self._workers:
            for plan in dict.fromkeys((self._plain, self._long, *(each.row.plan for each in measured))):
                self._take(self._references[plan], lambda path, plan=plan: self._ask_reference(plan, path))  # type: ignore[misc]

    def judge(self, measured: list[Measured], chunks: int) -> dict[str, bytes]:
        """Give each row its agreement, and the first pictures as PNG by slug; rows without all chunks get none."""
        wanted = {plan: np.concatenate(each) for plan, each in self._references.items() if len(each) == chunks}
        pixels = self._pixels(wanted[self._plain]) if self._plain in wanted else None
        pictures, scored = {}, {}
        for each in measured:
            found = self._latents[each.row.slug]
            if len(found) != chunks:
                continue
            got = np.concatenate(found)
            drawn = self._pixels(got)
            each.agreement = self._agreement(got, drawn, each.row.plan, wanted, pixels)
            if drawn is not None:
                pictures[each.row.slug] = png_of(drawn[0])
                scored[each.row.slug] = self._score(drawn)
        base = next((scores for scores in scored.values() if scores), {})
        for each in measured:
            each.scores = tuple(
                _score(name, values, base[name]) for name, values in scored.get(each.row.slug, {}).items()
            )
        return pictures

    def _score(self, pixels: Any) -> dict[str, list[float]]:
        """The scores of pictures by name; none if nobody asked for them, or if their process fails."""
        if self._scorer is None:
            return {}
        path = self._folder / "pictures.npy"
        write_latents(path, pixels)
        of_chunk = list(islice(cycle(self._prompts), self._batch))
        prompts = list(islice(cycle(of_chunk), len(pixels)))
        try:
            return self._scorer.ask("score", path=str(path), prompts=prompts)
        except IlfError as error:
            log.warning("pictures cannot be scored: %s", one_line(error))
            return {}

    def _take(self, latents: list[Any], ask: Callable[[Path], object]) -> None:
        path = self._folder / "latents.npy"
        try:
            ask(path)
        except IlfError as error:
            log.warning("pictures cannot be compared: %s", one_line(error))
        else:
            latents.append(read_latents(path))

    def _ask_row(self, each: Measured, path: Path) -> None:
        self._workers[each.row.side].ask("latents", slug=each.row.slug, path=str(path))

    def _ask_reference(self, plan: StepPlan, path: Path) -> None:
        self._workers[Side.TORCH].ask("reference", plan=plan.as_json(), path=str(path))

    def _pixels(self, latents: Any) -> Any:
        """What the bundle's decoder makes of latents, whoever made them; None without one, and for latents with NaN."""
        path = self._folder / "pixels.npy"
        write_latents(path, latents)
        try:
            answer = self._workers[Side.RUNTIME].ask("pixels", path=str(path))
        except IlfError:
            return None
        return read_latents(path) if answer["pixels"] else None

    def _agreement(self, got: Any, drawn: Any, own: StepPlan, wanted: Arrays, pixels: Any) -> Agreement:
        own_db, plain_db, long_db = (
            decibels(got, wanted[plan]) if plan in wanted else None for plan in (own, self._plain, self._long)
        )
        pixels_db = None if drawn is None or pixels is None else decibels(drawn, pixels)
        relative = relative_difference(got, wanted[own]) if own in wanted else None
        return Agreement(own_db, plain_db, long_db, pixels_db, float(1 - np.isfinite(got).mean()), relative)


def _score(name: str, values: Sequence[float], base: Sequence[float]) -> PictureScore:
    """The score of a row; the base line has no difference."""
    mean = float(np.mean(values))
    if values is base:
        return PictureScore(name, mean)
    interval = mean_interval([value - other for value, other in zip(values, base, strict=True)])
    return PictureScore(name, mean, interval.median, interval.low, interval.high)
