"""Results of benchmarks that nobody measured: numbers drawn from a seed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ilf_trt.bench.observation import Observation
from ilf_trt.bench.result import RESULT_FILE, Agreement, ColdStart, Noise, Result, RowResult, Subject, Verdict
from ilf_trt.bench.row import Boundary, Side
from ilf_trt.bench.statistics import ratio_interval, spread

BLOCKS, TURNS, SCATTER = 12, 40, 0.01
WORK: dict[str, tuple[str, Side, int, int, int, float]] = {
    "eager": ("eager PyTorch, 20 steps", Side.TORCH, 20, 0, 240, 4600.0),
    "eager-equal": ("eager PyTorch, 11 steps (equal cost)", Side.TORCH, 11, 0, 132, 2530.0),
    "eager-ilf": ("eager PyTorch, ILF 10 steps", Side.TORCH, 10, 2, 128, 2480.0),
    "compile": ("torch.compile, 20 steps", Side.TORCH, 20, 0, 240, 4180.0),
    "plain": ("engines, 20 steps", Side.RUNTIME, 20, 0, 240, 3680.0),
    "equal": ("engines, 11 steps (equal cost)", Side.RUNTIME, 11, 0, 132, 2060.0),
    "ilf": ("engines, ILF 10 steps", Side.RUNTIME, 10, 2, 128, 1990.0),
}
"""Title, side, steps, steps with feedback, block forwards and median ms of each row."""


def times_ms(slug: str, *, seed: int = 0, scatter: float = SCATTER, turns: int = TURNS) -> list[float]:
    """Times around the median of a row, skewed to the right as times are."""
    rng = np.random.default_rng([seed, *slug.encode()])
    drift = 1 + 0.01 * np.sin(np.arange(turns) / 9)
    return [float(each) for each in WORK[slug][-1] * drift * (1 + rng.gamma(2.0, scatter, turns))]


def observations(batch: int = 1, *, slugs: tuple[str, ...] = tuple(WORK), **how: Any) -> list[Observation]:
    """Two warm-ups and the turns of every row."""
    made = []
    for slug in slugs:
        for turn, host_ms in enumerate([9e3, 8e3, *(batch * each for each in times_ms(slug, **how))], -2):
            made.append(Observation(slug, batch, turn, max(turn, 0) * 20.0, host_ms))
    return made


def row(slug: str, batch: int = 1, **how: Any) -> RowResult:
    """A row with a ratio to `eager`; it agrees with eager by what its steps allow."""
    title, side, steps, feedback, forwards, _ = WORK[slug]
    own, base = ([batch * each for each in times_ms(name, **how)] for name in (slug, "eager"))
    runtime = side is Side.RUNTIME
    quality = {20: 31.5, 11: 24.8, 10: 27.9}[steps]
    return RowResult(
        slug=slug,
        title=title,
        batch=batch,
        side=side,
        library="ONNX Runtime 1.31" if runtime else "torch 2.13",
        precision="fp32",
        steps=steps,
        feedback_steps=feedback,
        block_forwards=forwards,
        warm_ups=2,
        host=spread(own),
        ratio=None if slug == "eager" else ratio_interval(base, own),
        pictures_per_s=batch * 1000 / float(np.median(own)),
        peak_mib=412.5 if runtime else 1310.0,
        cold=ColdStart(0.31 if runtime else 4.2, 0.9, 2.2),
        agreement=Agreement(
            own_plan_db=98.4 if runtime else None,
            plain_db=None if steps == 20 and not runtime else quality + (60 if steps == 20 else 0),
            long_db=quality - 0.1 * runtime,
        ),
    )


def result(*batches: int, **changes: Any) -> Result:
    """A whole result; `changes` replaces fields of it."""
    rows = tuple(row(slug, batch) for batch in batches or (1,) for slug in WORK)
    whole = Result(
        command="ilf-trt bench model.ilf --against eager,compile --batch 1,4 -o results",
        started="2026-11-29T10:00:00+00:00",
        finished=True,
        subject=Subject("emoji.ilf", "5f3a" * 16, "be17" * 16, "PixArt, 12 blocks, latents 4x16x16", "fp32"),
        boundary=Boundary.DENOISE,
        guidance_scale=4.5,
        size=(128, 128),
        device="AMD EPYC 9654, 2 cores",
        base_line="eager",
        within=0.02,
        rows=rows,
        ilf_ms={
            "text": 0.0,
            "cond": 21.0,
            "pre": 148.0,
            "loop_body": 1420.0,
            "loop_feedback": 96.0,
            "post": 262.0,
            "decode": 0.0,
            "host": 9.5,
        },
        fell_out=(),
        noise=Noise(0.012, 0.08, 0.51),
        verdict=Verdict(comparable=True),
    )
    return replace(whole, **changes)


def with_row(whole: Result, slug: str, **changes: Any) -> Result:
    """The result with one row changed at every batch."""
    return replace(whole, rows=tuple(replace(each, **changes) if each.slug == slug else each for each in whole.rows))


def failed(whole: Result, slug: str, reason: str) -> Result:
    """The result with a row that gave nothing."""
    nothing = dict.fromkeys(("host", "device", "ratio", "pictures_per_s", "peak_mib", "cold", "agreement"))
    return with_row(whole, slug, failed=reason, **nothing)


def written(whole: Result, samples: list[Observation] | None, folder: Path) -> Path:
    """A folder as `ilf-trt bench -o` leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT_FILE).write_text(json.dumps(whole.as_json()))
    if samples is not None:
        (folder / "observations.jsonl").write_text("".join(f"{json.dumps(one.as_json())}\n" for one in samples))
    return folder
