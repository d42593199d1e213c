"""The tables of the GPU measurements from their CSVs, and the aims of the project; this file loads no torch."""

from dataclasses import dataclass

from benchmarks.record import read_rows

FACTS, PARITY, LATENCY = "gpu-facts", "gpu-parity", "gpu-latency"
NOT_MEASURED = "Not measured: no GPU was at hand."
ILF_ROW = "ilf-trt ILF"
AIM_KEY = ("gpu", "model", "batch", "row", "precision")

Row = dict[str, str]


@dataclass(frozen=True, slots=True)
class Aim:
    """A number that the best engine library shall reach with ILF at batch 1."""

    what: str
    model: str
    precision: str
    column: str
    value: float
    more_is_better: bool = True


AIMS = (
    Aim("PixArt-α 1024, FP16, 3 times as fast as eager", "pixart-alpha-1024", "fp16", "faster_than_eager_20", 3),
    Aim("PixArt-α 1024, FP8, 4 times as fast as eager", "pixart-alpha-1024", "fp8", "faster_than_eager_20", 4),
    Aim("DiT-XL/2 256, FP16, 5 times as fast as eager", "dit-xl-256", "fp16", "faster_than_eager_20", 5),
    Aim("PixArt-α 1024, FP16, 60 % of the matrix rate", "pixart-alpha-1024", "fp16", "linear_share", 0.6),
    Aim("DiT-XL/2 256, FP16, launched within 50 µs", "dit-xl-256", "fp16", "launch_us", 50, more_is_better=False),
)


def gpu_latency(rows: list[Row] | None = None) -> str:
    """Every row of every model on a GPU; below the table, the rows without a measurement and the reasons."""
    rows = read_rows(LATENCY) if rows is None else rows
    measured = [row for row in rows if row["denoise_p50_ms"]]
    if not measured:
        return NOT_MEASURED
    lines = [
        "| model | batch | what runs | library | precision | steps | block forwards | denoise ms p50 / p95 | "
        "end to end ms | faster than eager 20 (spread) | peak MiB | engines MiB | build s | cold load s | launch µs | "
        "of the matrix rate | difference from fp32 | PSNR to 20 steps, dB |",
        f"|{'---|' * 18}",
    ]
    for row in measured:
        low, middle, high = (float(row[name]) for name in ("faster_min", "faster_than_eager_20", "faster_max"))
        share = f"{float(row['linear_share']):.0%}" if row["linear_share"] else ""
        cells = [row[name] for name in ("model", "batch", "row", "library", "precision", "steps", "block_forwards")]
        cells += [f"{row['denoise_p50_ms']} / {row['denoise_p95_ms']}", row["end_to_end_ms"]]
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


def gpu_aims(rows: list[Row] | None = None) -> list[str]:
    """Whether each aim of the project is met, one line an aim and GPU."""
    rows = read_rows(LATENCY) if rows is None else rows
    lines = []
    for gpu in dict.fromkeys(row["gpu"] for row in rows) or [""]:
        for aim in AIMS:
            wanted = (gpu, aim.model, "1", ILF_ROW, aim.precision)
            of_aim = [row for row in rows if tuple(row[name] for name in AIM_KEY) == wanted]
            values = [float(row[aim.column]) for row in of_aim if row[aim.column]]
            if not values:
                lines.append(f"aim not measured: {aim.what}" + (f", {gpu}" if gpu else ""))
                continue
            best = max(values) if aim.more_is_better else min(values)
            met = best >= aim.value if aim.more_is_better else best <= aim.value
            lines.append(f"aim {'met' if met else 'missed'}: {aim.what}: {best:g}, {gpu}")
    return lines


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
