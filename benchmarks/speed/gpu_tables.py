"""The tables of the GPU measurements from their CSVs, and what a row is held against; this file loads no torch."""

from dataclasses import dataclass

from benchmarks.record import read_rows

FACTS, RATES, PARITY, LATENCY, ROOFLINE = "gpu-facts", "gpu-rates", "gpu-parity", "gpu-latency", "gpu-roofline"
NOT_MEASURED = "Not measured: no GPU was at hand."
ILF_ROW, TORCH_ILF_ROW = "ilf-trt ILF", "captured ILF by torch"
FP8_ATTENTION = "fp8-attention"
ROW_KEY = ("gpu", "model", "batch", "row", "precision")
SHARE = 0.8

Row = dict[str, str]


@dataclass(frozen=True, slots=True)
class Limit:
    """A number that the best engine library with ILF at batch 1 is held against.

    The limit is `SHARE` of column `bound` in the roofline of the same GPU, model and precision, or `value`.
    """

    what: str
    model: str
    precision: str
    column: str
    bound: str = ""
    value: float = 0.0
    more_is_better: bool = True

    def on(self, gpu: str, roofline: list[Row]) -> float | None:
        """The limit on a GPU; None if the roofline does not know that GPU."""
        if not self.bound:
            return self.value
        for row in roofline:
            if is_gpu(row["gpu"], gpu) and (row["model"], row["precision"]) == (self.model, self.precision):
                return SHARE * float(row[self.bound])
        return None


OVER_EAGER = f"{SHARE * 100:.0f} % of the roofline, faster than eager"
OF_LINEARS = f"{SHARE * 100:.0f} % of the roofline, share of the matrix rate"
LIMITS = (
    Limit(f"{OVER_EAGER}, PixArt-α 1024 fp16", "pixart-alpha-1024", "fp16", "faster_than_eager_20", "faster_ilf"),
    *(
        Limit(f"{OVER_EAGER}, PixArt-α 1024 {name}", "pixart-alpha-1024", name, "faster_than_eager_20", "faster_ilf")
        for name in ("fp8", FP8_ATTENTION)
    ),
    Limit(f"{OVER_EAGER}, DiT-XL/2 256 fp16", "dit-xl-256", "fp16", "faster_than_eager_20", "faster_ilf"),
    Limit(f"{OF_LINEARS}, PixArt-α 1024 fp16", "pixart-alpha-1024", "fp16", "linear_share", "linear_share"),
    Limit("launch within 50 µs, DiT-XL/2 256 fp16", "dit-xl-256", "fp16", "launch_us", value=50, more_is_better=False),
)


def is_gpu(name: str, measured: str) -> bool:
    """Whether torch's name of a GPU, such as `NVIDIA H100 80GB HBM3`, is the `H100 SXM` or `H200` of the roofline."""
    words = measured.split()
    return name.split()[0] in words and not {"PCIe", "NVL"} & set(words)


def gpu_latency(rows: list[Row] | None = None) -> str:
    """Every row of every model on a GPU; below the table, the rows without a measurement and the reasons."""
    rows = read_rows(LATENCY) if rows is None else rows
    measured = [row for row in rows if row["denoise_p50_ms"]]
    if not measured:
        return NOT_MEASURED
    lines = [
        "| model | batch | what runs | library | precision | steps | block forwards | "
        "denoise ms p50 / p90 | end to end ms | faster than eager 20 (95 % interval) | peak MiB | engines MiB | "
        "build s | cold load s | launch µs | of the matrix rate | difference from fp32 | PSNR to 20 steps, dB |",
        f"|{'---|' * 18}",
    ]
    for row in measured:
        low, middle, high = (float(row[name]) for name in ("faster_low", "faster_than_eager_20", "faster_high"))
        share = f"{float(row['linear_share']):.0%}" if row["linear_share"] else ""
        cells = [row[name] for name in ("model", "batch", "row", "library", "precision", "steps", "block_forwards")]
        cells += [f"{row['denoise_p50_ms']} / {row['denoise_p90_ms']}", row["end_to_end_ms"]]
        cells += [f"{middle:.2f}x ({low:.2f} to {high:.2f})", row["peak_device_mib"], row["engine_mib"]]
        launch = row["launch_us"] + " (not captured)" * (row["captured"] == "no")
        cells += [row["build_s"], row["cold_load_s"], launch, share, row["relative_difference"], row["psnr_db"]]
        lines.append(f"| {' | '.join(cell or '–' for cell in cells)} |")
    machines = dict.fromkeys((row["device"], row["versions"]) for row in measured)
    lines += ["", *(f"Measured on {device}; {versions}." for device, versions in machines)]
    return "\n".join([*lines, *_gaps(rows)])


def _gaps(rows: list[Row]) -> list[str]:
    """One line for each reason, with its rows."""
    reasons: dict[str, list[Row]] = {}
    for row in rows:
        if row["note"]:
            reasons.setdefault(row["note"], []).append(row)
    lines = []
    for reason, empty in reasons.items():
        names = ", ".join(dict.fromkeys(f"{row['row']} ({row['library']} {row['precision']})" for row in empty))
        models = ", ".join(dict.fromkeys(f"{row['model']} batch {row['batch']}" for row in empty))
        lines += ["", f"Not measured: {names} of {models}: {reason}."]
    return lines


def gpu_limits(rows: list[Row] | None = None, roofline: list[Row] | None = None) -> list[str]:
    """Whether the best engine library reaches each limit, one line a limit and GPU."""
    rows = read_rows(LATENCY) if rows is None else rows
    roofline = read_rows(ROOFLINE) if roofline is None else roofline
    lines = []
    for gpu in dict.fromkeys(row["gpu"] for row in rows) or [""]:
        for each in LIMITS:
            values = [
                float(row[each.column])
                for row in rows
                if tuple(row[name] for name in ROW_KEY) == (gpu, each.model, "1", ILF_ROW, each.precision)
                and row[each.column]
            ]
            if not values:
                lines.append(f"not measured: {each.what}" + (f", {gpu}" if gpu else ""))
                continue
            limit, best = each.on(gpu, roofline), max(values) if each.more_is_better else min(values)
            if limit is None:
                lines.append(f"no roofline: {each.what}: {best:g}, {gpu}")
                continue
            reached = best >= limit if each.more_is_better else best <= limit
            lines.append(f"{'' if reached else 'not '}reached: {each.what}: {best:g} of {limit:.3g}, {gpu}")
    return lines


def gpu_roofline(rows: list[Row] | None = None, latency: list[Row] | None = None) -> str:
    """The roofline of every GPU, model and precision, with the measured speed over eager where there is one."""
    rows = read_rows(ROOFLINE) if rows is None else rows
    latency = read_rows(LATENCY) if latency is None else latency
    titles = ("GPU", "model", "precision", "Linears µs", "attention µs (at 80)", "norms, gates µs", "gaps µs (kernels)")
    titles = (*titles, "block pass µs", "of the matrix rate", "eager's block pass µs (kernels)")
    titles = (*titles, "20 plain steps over eager", "ILF over eager (at 80)", "measured", "rates")
    lines, empty = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"], False
    for row in rows:
        measured = _measured(row, latency)
        empty = empty or not measured
        cells = [row[name] for name in ("gpu", "model", "precision", "linears_us")]
        cells += [f"{row['attention_us']} ({row['attention_us_at_80']})", row["rest_us"]]
        cells += [f"{row['gaps_us']} ({row['kernels']})", row["pass_us"], f"{float(row['linear_share']):.0%}"]
        cells += [f"{row['eager_us']} ({row['eager_kernels']})", f"{float(row['faster_plain']):.2f}x"]
        cells += [f"{float(row['faster_ilf']):.2f}x ({float(row['faster_ilf_at_80']):.2f}x)"]
        cells += [measured or "–", row["rates"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"–: {NOT_MEASURED}"] if empty else lines)


def _measured(row: Row, latency: list[Row]) -> str:
    """The best measured ILF over eager of a row of the roofline; without an engine's, that of torch's CUDA graph."""
    for name, suffix in ((ILF_ROW, ""), (TORCH_ILF_ROW, " by torch")):
        values = [
            float(other["faster_than_eager_20"])
            for other in latency
            if is_gpu(row["gpu"], other["gpu"])
            and tuple(other[key] for key in ROW_KEY[1:]) == (row["model"], "1", name, row["precision"])
            and other["faster_than_eager_20"]
        ]
        if values:
            return f"{max(values):.2f}x{suffix}"
    return ""


def gpu_facts() -> str:
    """The measured rates of each GPU."""
    rows = [row for row in read_rows(FACTS) if row["unit"]]
    if not rows:
        return NOT_MEASURED
    lines = ["| GPU | what | size | median | best | unit |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = [row[name] or row["note"] or "–" for name in ("gpu", "what", "size", "median", "best", "unit")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def gpu_parity() -> str:
    """The differences of the graphs and of both trajectories, for each bundle and library."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in read_rows(PARITY):
        groups.setdefault(tuple(row[name] for name in ("gpu", "model", "batch", "library", "precision")), []).append(
            row
        )
    if not groups:
        return NOT_MEASURED
    lines = [
        "| GPU | model | batch | library | precision | graphs, largest relative difference | latents | limit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, rows in groups.items():
        if rows[0]["note"]:
            lines.append(f"| {' | '.join(key)} | not measured: {rows[0]['note']} | – | – |")
            continue
        latents = [row for row in rows if row["what"].startswith("latents ")]
        graphs = [float(row["relative"]) for row in rows if row not in latents]
        largest = f"{max(graphs):.1e}" if graphs else "–"
        of_latents = ", ".join(
            f"{float(row['relative']):.1e} {row['what'].removeprefix('latents ')}" for row in latents
        )
        lines.append(f"| {' | '.join(key)} | {largest} | {of_latents} | {rows[0]['limit']} |")
    return "\n".join(lines)
