"""The report of one engine: the cost of its build, its kernels, and the kernels in another precision."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from ilf_trt.contract.manifest import ATTENTION_PRODUCTS
from ilf_trt.contract.spec import Precision
from ilf_trt.errors import shown

from .listing import Kernel

MIB = 1 << 20
COUNTED = ("matmul", "attention")


@dataclass(frozen=True, slots=True)
class EngineReport:
    """`expected` names the products that must run in FP8: Linears, and `….scores` and `….mixed` of attentions.

    `kernels` is empty if the library lists none.
    """

    graph: str
    precision: str
    build_s: float
    builder_peak_mib: float
    engine_bytes: int
    scratch_bytes: int
    network_layers: dict[str, int]
    expected: tuple[str, ...]
    kernels: tuple[Kernel, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        return asdict(self)

    @property
    def by_kind(self) -> dict[tuple[str, str], int]:
        """Number of kernels by (kind, precision), most first."""
        return dict(Counter((kernel.kind, kernel.precision or "?") for kernel in self.kernels).most_common())

    @property
    def fused_attentions(self) -> int:
        """Number of attentions that run as one kernel."""
        return sum(kernel.kind == "attention" for kernel in self.kernels)

    @property
    def outside(self) -> tuple[Kernel, ...]:
        """Matrix products and attentions in another precision than the requested one.

        In an FP8 engine, FP16 is right for the Linears and attentions that are not in `expected`. An attention that is
        in there is one kernel: its two products apart are not as asked, in whatever precision.
        """
        return tuple(
            kernel
            for kernel in self.kernels
            if kernel.kind in COUNTED
            and (kernel.precision != self._requested_precision(kernel) or self._is_apart(kernel))
        )

    def _is_apart(self, kernel: Kernel) -> bool:
        """Whether a kernel is one product of an attention that should run in FP8 as a whole."""
        asked = set(kernel.layers) & set(self.expected)
        return kernel.kind == "matmul" and any(name.rpartition(".")[2] in ATTENTION_PRODUCTS for name in asked)

    def _requested_precision(self, kernel: Kernel) -> str:
        if self.precision != Precision.FP8:
            return self.precision
        return Precision.FP8.value if set(kernel.layers) & set(self.expected) else Precision.FP16.value


def report_table(reports: tuple[EngineReport, ...]) -> Table:
    """A terminal table with one row per graph: kernels by precision, MiB, and kernels in another precision."""
    table = Table("graph", "kernels", *COUNTED, "MiB", "scratch", "s", "not as asked")
    for column in table.columns[:-1]:
        column.no_wrap = True
    for report in reports:
        cells = [
            _cell(*(f"{count} {precision}" for (what, precision), count in report.by_kind.items() if what == kind))
            for kind in COUNTED
        ]
        outside = [f"{kernel.precision or '?'} {', '.join(kernel.labels)}" for kernel in report.outside]
        table.add_row(
            _cell(report.graph),
            str(len(report.kernels)) if report.kernels else "not listed",
            *cells,
            f"{report.engine_bytes / MIB:.1f}",
            f"{report.scratch_bytes / MIB:.1f}",
            f"{report.build_s:.1f}",
            _cell(*outside or ["–" if report.kernels else "not known"]),
        )
    return table


def layer_table(report: EngineReport) -> Table:
    """A terminal table of the matrix products, attentions and convolutions of one engine, with their precision."""
    table = Table("layer", "kind", "precision", title=_cell(report.graph), title_justify="left")
    for kernel in report.kernels:
        if kernel.kind != "other":
            table.add_row(_cell(*kernel.labels), _cell(kernel.kind), _cell(kernel.precision or "?"))
    return table


def _cell(*lines: str) -> Text:
    """Names from an engine or from a bundle's report: control characters are escaped, markup stays text."""
    return Text("\n".join(map(shown, lines)))
