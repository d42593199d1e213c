"""The report of one engine: what it cost to build, what it holds, and what in it is not in the precision asked for."""

from collections import Counter
from dataclasses import asdict, dataclass, fields
from typing import Any

from rich.table import Table
from rich.text import Text

from ilf_trt.contract.spec import Precision
from ilf_trt.engines.listing import Kernel

MIB = 1 << 20
COUNTED = ("matmul", "attention")


@dataclass(frozen=True, slots=True)
class EngineReport:
    """`expected` names the Linears that shall run in FP8; `kernels` is empty where the library told none."""

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
        """Plain data; `from_json` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "EngineReport":
        """Raises TypeError or KeyError for other data."""
        known = {field.name: data[field.name] for field in fields(cls)}
        kernels = tuple(Kernel(**{**kernel, "layers": tuple(kernel["layers"])}) for kernel in data["kernels"])
        return cls(**{**known, "expected": tuple(data["expected"]), "kernels": kernels})

    @property
    def by_kind(self) -> dict[tuple[str, str], int]:
        """Number of kernels by (kind, precision), most first."""
        return dict(Counter((kernel.kind, kernel.precision or "?") for kernel in self.kernels).most_common())

    @property
    def fused_attentions(self) -> int:
        """Attentions that run as one kernel."""
        return sum(kernel.kind == "attention" for kernel in self.kernels)

    @property
    def outside(self) -> tuple[Kernel, ...]:
        """Matrix products and attentions that do not run in the precision asked for.

        In an FP8 engine attention and the Linears that were left out belong in FP16.
        """
        return tuple(
            kernel for kernel in self.kernels if kernel.kind in COUNTED and kernel.precision != self._asked(kernel)
        )

    def _asked(self, kernel: Kernel) -> str:
        if self.precision != Precision.FP8:
            return self.precision
        return Precision.FP8.value if set(kernel.layers) & set(self.expected) else Precision.FP16.value


def report_table(reports: tuple[EngineReport, ...]) -> Table:
    """One row a graph for a terminal: kernels, products and attentions by precision, MiB, what is not as asked."""
    table = Table("graph", "kernels", *COUNTED, "MiB", "scratch", "s", "not as asked")
    for column in table.columns[:-1]:
        column.no_wrap = True
    for report in reports:
        cells = [
            "\n".join(f"{count} {precision}" for (what, precision), count in report.by_kind.items() if what == kind)
            for kind in COUNTED
        ]
        outside = [f"{kernel.precision or '?'} {', '.join(kernel.named)}" for kernel in report.outside]
        table.add_row(
            report.graph,
            str(len(report.kernels)) if report.kernels else "not listed",
            *cells,
            f"{report.engine_bytes / MIB:.1f}",
            f"{report.scratch_bytes / MIB:.1f}",
            f"{report.build_s:.1f}",
            Text("\n".join(outside) or ("–" if report.kernels else "not known")),
        )
    return table


def layer_table(report: EngineReport) -> Table:
    """Every matrix product, attention and convolution of one engine, and the precision that it got."""
    table = Table("layer", "kind", "precision", title=report.graph, title_justify="left")
    for kernel in report.kernels:
        if kernel.kind != "other":
            table.add_row(Text("\n".join(kernel.named)), kernel.kind, kernel.precision or "?")
    return table
