"""Small pictures as SVG: bars, strips of runs, and points, in percent of their width so that they fit every screen."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .markup import Markup, element

STRIP_PX = 38
MARGIN_PX = 5
BAR_PX = 14
POINTS_PX = 280
AXIS_PX = 20
DOT_PX = 2.2
MOST_DOTS = 200
"""Of a strip; a longer series is thinned evenly, its box counts every run."""
MOST_TICKS = 6
LABEL_PX = 14


@dataclass(frozen=True, slots=True)
class Scale:
    """Numbers from `low` to `high` as percent of a width or a height, clamped to it."""

    low: float
    high: float

    def percent(self, value: float) -> float:
        """Where a value lies, from 0 to 100."""
        span = self.high - self.low
        if not (math.isfinite(span) and span > 0):
            return 0.0
        return min(max((value - self.low) / span, 0.0), 1.0) * 100

    def ticks(self) -> list[float]:
        """Round numbers within the scale, at most six or so."""
        span = self.high - self.low
        if not (math.isfinite(span) and span > 0):
            return [self.low]
        rough = span / (MOST_TICKS - 1)
        power = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 0.0
        if not power:
            return [self.low]
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        return [step * (first + index) for index in range(math.floor((self.high - step * first) / step + 1e-9) + 1)]


def bar(part: float, kind: str) -> Markup:
    """A bar over a share of its width, from 0 to 1."""
    rect = element(
        "rect", class_=f"fill {kind}", x="0", y="0", width=_pc(100 * min(max(part, 0.0), 1.0)), height=BAR_PX
    )
    return _svg(element("rect", class_="track", x="0", y="0", width="100%", height=BAR_PX), rect, height=BAR_PX)


def time_bar(p50_ms: float, p90_ms: float, scale: Scale, kind: str) -> Markup:
    """A bar to the median, and a line from there to the 90th percentile."""
    middle, end, centre = scale.percent(p50_ms), scale.percent(p90_ms), STRIP_PX / 2
    return _svg(
        *_grid(scale, STRIP_PX),
        element("rect", class_=f"fill {kind}", x="0", y=centre - 7, width=_pc(middle), height=14),
        element("line", class_="whisker", x1=_pc(middle), x2=_pc(end), y1=centre, y2=centre),
        element("line", class_="whisker", x1=_pc(end), x2=_pc(end), y1=centre - 4, y2=centre + 4),
        height=STRIP_PX,
    )


def deviation_strip(deviations: Sequence[float], scale: Scale, kind: str) -> Markup:
    """Runs as dots, the first at the top and the last at the bottom; the box holds the middle half of them."""
    series = np.asarray(deviations, np.float64)
    low, middle, high = (scale.percent(float(value)) for value in np.quantile(series, (0.25, 0.5, 0.75)))
    picks = np.unique(np.linspace(0, len(series) - 1, min(len(series), MOST_DOTS)).round().astype(int))
    height = STRIP_PX - 2 * MARGIN_PX
    dots = [
        element(
            "circle",
            class_=f"dot {kind}{'' if scale.low <= series[pick] <= scale.high else ' beyond'}",
            cx=_pc(scale.percent(float(series[pick]))),
            cy=MARGIN_PX + height * (float(pick) / (len(series) - 1) if len(series) > 1 else 0.5),
            r=DOT_PX,
        )
        for pick in picks
    ]
    return _svg(
        *_grid(scale, STRIP_PX),
        element("rect", class_=f"box {kind}", x=_pc(low), y=3, width=_pc(max(high - low, 0.0)), height=STRIP_PX - 6),
        element("line", class_="middle", x1=_pc(middle), x2=_pc(middle), y1=3, y2=STRIP_PX - 3),
        *dots,
        height=STRIP_PX,
    )


def axis(scale: Scale, words: Sequence[str]) -> Markup:
    """Text below the ticks of a scale; `words` has one for every tick."""
    labels = [
        element("text", word, class_="tick", x=_pc(place), y=13, text_anchor=_anchor(place))
        for word, place in zip(words, map(scale.percent, scale.ticks()), strict=True)
    ]
    return _svg(*labels, height=AXIS_PX)


@dataclass(frozen=True, slots=True)
class Point:
    """A point with a short label beside it."""

    x: float
    y: float
    label: str
    kind: str


def points(shown_points: Sequence[Point], across: Scale, up: Scale) -> Markup:
    """Labelled points over a grid; labels that would touch one another move down."""
    marks: list[Markup] = []
    taken: list[tuple[float, float]] = []
    for point in sorted(shown_points, key=lambda each: -each.y):
        x, y = across.percent(point.x), _down(point.y, up)
        place = y + 4
        while any(abs(x - other_x) < 6 and abs(place - other_y) < LABEL_PX for other_x, other_y in taken):
            place += LABEL_PX
        taken.append((x, place))
        end, side = ("end", -9) if x > 90 else ("start", 9)
        marks += [
            element("circle", class_=f"mark {point.kind}", cx=_pc(x), cy=y, r=5),
            element("text", point.label, class_="label", x=_pc(x), dx=side, y=place, text_anchor=end),
        ]
    return _svg(*_grid(across, POINTS_PX), *_rungs(up), *marks, height=POINTS_PX)


def side_axis(up: Scale, words: Sequence[str]) -> Markup:
    """Text at the left of `points`; `words` has one for every tick."""
    labels = [
        element("text", word, class_="tick", x="100%", y=_down(tick, up) + 4, text_anchor="end")
        for word, tick in zip(words, up.ticks(), strict=True)
    ]
    return _svg(*labels, height=POINTS_PX)


def _svg(*content: Markup, height: float) -> Markup:
    return element("svg", *content, width="100%", height=height, aria_hidden="true", focusable="false")


def _grid(scale: Scale, height: float) -> list[Markup]:
    return [
        element("line", class_="grid", x1=_pc(place), x2=_pc(place), y1=0, y2=height)
        for place in map(scale.percent, scale.ticks())
    ]


def _rungs(up: Scale) -> tuple[Markup, ...]:
    return tuple(
        element("line", class_="grid", x1="0", x2="100%", y1=_down(tick, up), y2=_down(tick, up)) for tick in up.ticks()
    )


def _down(value: float, up: Scale) -> float:
    """Pixels from the top of `points`."""
    return 12 + (POINTS_PX - 24) * (1 - up.percent(value) / 100)


def _anchor(place: float) -> str:
    return "start" if place < 4 else "end" if place > 96 else "middle"


def _pc(value: float) -> str:
    return f"{value:.2f}%"
