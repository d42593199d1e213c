"""Rewrites the tables of the documents from the committed CSVs, between their markers.

python -m benchmarks.tables
"""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.record import RESULTS, ROOT, read_rows
from benchmarks.speed.gpu_tables import gpu_facts, gpu_latency, gpu_limits, gpu_parity, gpu_roofline
from benchmarks.speed.smoke_table import gpu_smoke
from benchmarks.study.tables import STUDY, distances
from ilf_trt.bench.fairness import by_batch
from ilf_trt.bench.result import RESULT_FILE, read_result
from ilf_trt.bench.sentences import decibels, figure, ratio_words

Row = dict[str, str]


SUMMARY = {
    "eager diffusers": "PyTorch, plain",
    "eager diffusers at equal cost": "PyTorch, plain at the cost of ILF",
    "eager ILF": "PyTorch, ILF",
    "ONNX Runtime, one graph": "ONNX Runtime, one graph, plain",
    "ilf-trt plain": "ilf-trt, plain",
    "ilf-trt plain at equal cost": "ilf-trt, plain at the cost of ILF",
    "ilf-trt ILF": "**ilf-trt, ILF**",
}


def summary() -> str:
    """The demo on the machine that was measured last: speed, and the quality of the same plan over its noise seeds."""
    quality: dict[tuple[str, str], list[Row]] = {}
    for row in read_rows("quality-precision"):
        if row["precision"] == "fp32":
            quality.setdefault((row["steps"], row["block_forwards"]), []).append(row)
    demo = [row for row in read_rows("cpu-latency") if row["model"] == "demo"]
    rows = {row["row"]: row for row in demo if row["device"] == demo[-1]["device"]}
    lines = [
        "| what runs | steps | block forwards | times faster, median (least to most) | "
        "Fréchet distance, mean (each seed) | label accuracy |",
        "|---|---|---|---|---|---|",
    ]
    for name, title in SUMMARY.items():
        row = rows[name]
        drawn = quality[row["steps"], row["block_forwards"]]
        accuracy = np.mean([float(one["accuracy"]) for one in drawn])
        cells = [title, row["steps"], row["block_forwards"], faster(row), distances(drawn), f"{accuracy:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def faster(row: Row) -> str:
    """`8.68x (6.34 to 11.55)`: the median ratio to eager PyTorch with 20 steps, the least and the most."""
    low, middle, high = (float(row[name]) for name in ("faster_min", "faster_than_eager_20", "faster_max"))
    return f"{middle:.2f}x ({low:.2f} to {high:.2f})"


def latency() -> str:
    """Speed and quality of each row, by machine and model."""
    lines = [
        "| machine | model | what runs | steps | block forwards | faster than eager 20 (spread) | against one graph | "
        "difference from eager | Fréchet distance | accuracy |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in read_rows("cpu-latency"):
        cells = [machine(row), *(row[name] for name in ("model", "row", "steps", "block_forwards"))]
        cells += [faster(row), f"{float(row['cost_against_one_graph']):.3f}"]
        cells += [row[name] or "–" for name in ("relative_difference", "frechet", "accuracy")]
        lines += [f"| {' | '.join(cells)} |"]
    return "\n".join(lines)


def bench() -> str:
    """What `ilf-trt bench` measured: the committed results, ILF always beside its row of equal cost."""
    lines = [
        "| bundle | row | steps | block forwards | p50 ms | p90 ms | pictures a second | times faster (95 %) | "
        "PSNR to eager, same plan | to 50 steps |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for place in sorted((RESULTS / "bench").glob(f"*/{RESULT_FILE}")):
        result = read_result(place)
        for row in by_batch(result.rows)[1]:
            if row.host is None:
                lines.append(f"| {result.subject.bundle} | {row.title} | failed: {row.failed} |" + " – |" * 7)
                continue
            known = row.agreement
            qualities = (known.own_plan_db, known.long_db) if known else (None, None)
            cells = [result.subject.bundle, row.title, row.steps, row.block_forwards]
            cells += [figure(value) for value in (row.host.p50_ms, row.host.p90_ms, row.pictures_per_s)]
            cells += [ratio_words(row, result.rows), *map(decibels, qualities)]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def openvino() -> str:
    """OpenVINO against ONNX Runtime with the same steps and threads."""
    lines = [
        "| machine | model | graphs in OpenVINO | steps | block forwards | threads | precision | "
        "faster than ONNX Runtime (95 %) | difference from it |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in read_rows("openvino"):
        if row["library"] != "OpenVINO":
            continue
        low, middle, high = (float(row[f"faster_{name}"]) for name in ("low", "than_onnxruntime", "high"))
        graphs = row["graph"] if row["graph"].startswith("diffusers") else f"the bundle's, {row['graph']}"
        names = ("steps", "block_forwards", "threads", "precision")
        cells = [machine(row), row["model"], graphs, *(row[name] for name in names)]
        cells += [f"{middle:.2f}x ({low:.2f} to {high:.2f})", row["relative_difference"]]
        lines += [f"| {' | '.join(cells)} |"]
    return "\n".join(lines)


def process() -> str:
    """The cost of a serving process besides its engines."""
    lines = [
        "| machine | model | Python a step beyond the engines | `import ilf_trt.runtime` | peak memory |",
        "|---|---|---|---|---|",
    ]
    for row in read_rows("cpu-process"):
        overhead, seconds, memory = (row[name] for name in ("overhead_us_per_step", "import_s", "serving_peak_mib"))
        lines += [f"| {machine(row)} | {row['model']} | {overhead} µs | {seconds} s | {memory} MiB |"]
    return "\n".join(lines)


def machine(row: Row) -> str:
    """The processor of a row, without its trade marks and its cores."""
    return row["device"].partition(",")[0].replace("(R)", "").removesuffix(" Processor")


def precision() -> str:
    """The demo under three plans in every precision, with the spread of the seeds in float32."""
    cells: dict[tuple[str, str], list[Row]] = {}
    for row in read_rows("quality-precision"):
        cells.setdefault((row["plan"], row["precision"]), []).append(row)
    lines = [
        "| plan | precision | Fréchet distance, mean (each seed) | against fp32 | spread of fp32's seeds | accuracy |",
        "|---|---|---|---|---|---|",
    ]
    for (plan, name), rows in cells.items():
        distances = [float(row["frechet"]) for row in rows]
        base = [float(row["frechet"]) for row in cells[plan, "fp32"]]
        accuracy = np.mean([float(row["accuracy"]) for row in rows])
        lines.append(
            f"| {plan} | {name} | {np.mean(distances):.3f} ({' '.join(f'{d:.3f}' for d in distances)}) | "
            f"{np.mean(distances) - np.mean(base):+.3f} | {max(base) - min(base):.3f} | {accuracy:.3f} |"
        )
    return "\n".join(lines)


def full_size() -> str:
    """One row a build: time, sizes, kernels, and the fused attentions of pre, loop_body, loop_feedback and post."""
    builds: dict[tuple[str, str], dict[str, Row]] = {}
    for row in read_rows("build"):
        builds.setdefault((row["model"], row["precision"]), {})[row["graph"]] = row
    lines = [
        "| model | precision | export s | build s | peak MiB | ONNX MiB | engines MiB | of the weights | kernels | "
        "matrix products fp8 / fp16 | attentions fused | not as asked |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (model, name), graphs in builds.items():
        row = graphs["all"]
        cells = [
            row[key] for key in ("export_s", "build_s", "peak_mib", "onnx_mib", "engine_mib", "engines_of_weights")
        ]
        fused = " + ".join(graphs[graph]["fused_attentions"] for graph in ("pre", "loop_body", "loop_feedback", "post"))
        products = f"{row['matmul_fp8']} / {row['matmul_fp16']}"
        cells += [row["kernels"], products, fused, row["not_as_asked"]]
        lines.append(f"| {model} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def kernels_per_block() -> str:
    """Kernels of a block by model, precision and GPU: matrix products, attentions, and all others."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for row in read_rows("kernels-per-block"):
        parts = [
            f"{count} {precision} {name}{'s' if count > 1 else ''}"
            for kind, name in (("matmul", "product"), ("attention", "attention"))
            for precision in ("fp8", "fp16")
            if (count := int(row[f"{kind}_{precision}"]))
        ]
        told = f"**{row['kernels']}** = {' + '.join([*parts, row['other'] + ' others'])}"
        found.setdefault((row["model"], row["precision"]), {})[row["gpu"]] = told
    gpus = list(dict.fromkeys(gpu for cells in found.values() for gpu in cells))
    lines = [f"| model | precision | {' | '.join(gpus)} |", "|---" * (2 + len(gpus)) + "|"]
    lines += [f"| {' | '.join([*name, *(cells.get(gpu, '–') for gpu in gpus)])} |" for name, cells in found.items()]
    return "\n".join(lines)


def fp8_difference() -> str:
    """How far pictures in FP8 are from those in float32."""
    return columns_of("fp8-difference", "precision", "pictures", "median", "p90", "largest", "limit")


def hoisting() -> str:
    """Weights and operations of a picture, with everything in every step and with hoisting."""
    models: dict[tuple[str, str], dict[str, Row]] = {}
    for row in read_rows("hoisting"):
        models.setdefault((row["model"], row["text"]), {})[row["graph"]] = row
    lines = [
        "| model | text's keys and values | weights stored, MiB | weights read a picture, MiB | TFLOP a picture |",
        "|---|---|---|---|---|",
    ]
    for (model, text), graphs in models.items():
        before, after = graphs["all, in every step"], graphs["all, hoisted"]
        reads = [float(row["weights_mib"]) for row in (before, after)]
        work = [float(row["gflop_a_run"]) / 1000 for row in (before, after)]
        stored = " → ".join(f"{float(row['stored_mib']):,.0f}" for row in (before, after))
        lines.append(
            f"| {model} | {text} | {stored} | {reads[0]:,.0f} → {reads[1]:,.0f} ({reads[1] / reads[0] - 1:+.0%}) | "
            f"{work[0]:.2f} → {work[1]:.2f} ({work[1] / work[0] - 1:+.1%}) |"
        )
    return "\n".join(lines)


def text_gain() -> str:
    """The measured gain of computing the text's keys and values once a picture."""
    lines = ["| model | text tokens | faster with --hoist-text (spread) |", "|---|---|---|"]
    for row in read_rows("hoisting-text"):
        spread = f"{float(row['faster_hoisted']):.2f}x ({row['faster_min']} to {row['faster_max']})"
        lines.append(f"| {row['model']} | {row['text_tokens']} | {spread} |")
    return "\n".join(lines)


def training() -> str:
    """The memory of the engine by blocks, and its throughput against a plain loop."""
    rows = {row["what"]: row for row in read_rows("training")}
    lines = [
        "| blocks | backbone, MiB | F and s, MiB | optimizer, MiB | a checkpoint, MiB | growth of peak memory, MiB |",
        "|---|---|---|---|---|---|",
    ]
    names = ("blocks", "backbone_mib", "trained_mib", "optimizer_mib", "checkpoint_mib", "peak_growth_mib")
    lines += [
        f"| {' | '.join(row[name] for name in names)} |" for what, row in rows.items() if what.startswith("memory")
    ]
    speed = rows["speed"]
    return "\n".join(
        [
            *lines,
            "",
            "| throughput, loop = 1 (spread) | pairs | same loss to |",
            "|---|---|---|",
            f"| {speed['throughput_ratio_p50']} ({speed['ratio_min']} to {speed['ratio_max']}) | {speed['n']} | "
            f"{speed['loss_difference']} |",
        ]
    )


def serving() -> str:
    """Cold start, memory, and the growth of memory over many generations."""
    lines = [
        "| bundle | MiB on disk | process start to first picture, s (spread) | peak MiB | with low_memory: peak MiB "
        "| s | growth over 200 generations, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in read_rows("serving"):
        cold = f"{row['cold_start_s']} ({row['cold_start_min']} to {row['cold_start_max']})"
        cells = [
            row["model"],
            row["bundle_mib"],
            cold,
            row["peak_mib"],
            row["low_memory_peak_mib"],
            row["low_memory_s"],
        ]
        lines.append(f"| {' | '.join([*cells, row['resident_growth_mib'] or '–'])} |")
    return "\n".join(lines)


def text_export() -> str:
    """Memory of exporting a text encoder."""
    lines = [
        "| layers x width | shards | precision | weights, MiB | peak grew by, MiB | s |",
        "|---|---|---|---|---|---|",
    ]
    for row in read_rows("text-export"):
        names = ("shards", "precision", "weights_mib", "growth_mib", "export_s")
        lines.append(f"| {row['layers']} x {row['width']} | {' | '.join(row[name] for name in names)} |")
    return "\n".join(lines)


def reliability_kills() -> str:
    """What killed commands left."""
    names = ("killed", "signal", "kills", "ended before", "went on to the end", "output destroyed")
    titles = ("command", "signal", "kills", "ended before", "ended anyway", "output destroyed")
    titles = (*titles, "other result", "other exit code", "drafts left at the end")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in read_rows("reliability-kills"):
        other = int(row["other result"]) + int(row["other result at the end"])
        codes = int(row["other exit code"]) + int(row["died of the signal"])
        cells = [*(row[name] for name in names), str(other), str(codes), row["drafts left at the end"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def reliability_soak() -> str:
    """Many threads for some minutes."""
    names = ("model", "minutes", "generations", "other bits", "cancelled", "timed out", "stopped by progress")
    names = (*names, "warm-ups", "other errors", "threads that hang", "growth MiB", "growth descriptors")
    return columns_of("reliability-soak", *names)


def reliability_cost() -> str:
    """The cost of the finite check and of the sealed cache."""
    return columns_of("reliability-cost", "what", "model", "ratio", "lower quartile", "upper quartile", "ms", "MiB")


def columns_of(name: str, *columns: str) -> str:
    """Some columns of a CSV as they are."""
    rows = [[row[column] or "–" for column in columns] for row in read_rows(name)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows))


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"summary": summary},
    "docs/performance.md": {
        "cpu-latency": latency,
        "cpu-process": process,
        "quality-precision": precision,
        "build": full_size,
        "gpu-roofline": gpu_roofline,
    },
    "docs/training.md": {"training": training},
    "docs/reliability.md": {
        "reliability-kills": reliability_kills,
        "reliability-soak": reliability_soak,
        "reliability-cost": reliability_cost,
    },
    "docs/engines.md": {
        "kernels-per-block": kernels_per_block,
        "fp8-difference": fp8_difference,
        "hoisting": hoisting,
        "hoisting-text": text_gain,
    },
    "docs/pipelines.md": {"serving": serving, "text-export": text_export},
}

ANYWHERE: dict[str, Callable[[], str]] = {
    **STUDY,
    "bench": bench,
    "openvino": openvino,
    "gpu-latency": gpu_latency,
    "gpu-limits": lambda: "\n".join(f"- {line}" for line in gpu_limits()),
    "gpu-facts": gpu_facts,
    "gpu-parity": gpu_parity,
    "gpu-smoke": gpu_smoke,
}
"""Tables that any document may have."""


def documents() -> list[Path]:
    """The README and everything in docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def text_of(path: Path) -> str:
    """The text of a document with every table again; raises SystemExit where a table has no place, or two."""
    text = path.read_text()
    for name, table in TABLES.get(path.relative_to(ROOT).as_posix(), {}).items():
        text, count = _fill(text, name, table)
        if count != 1:
            raise SystemExit(f"{path} has {count} places for table {name}, expected 1")
    for name, table in ANYWHERE.items():
        text, _ = _fill(text, name, table)
    return text


def main() -> None:
    for path in documents():
        path.write_text(text_of(path))


def _fill(text: str, name: str, table: Callable[[], str]) -> tuple[str, int]:
    marked = re.compile(f"(<!-- table {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    return marked.subn(lambda match: match[1] + table() + "\n" + match[2], text)


if __name__ == "__main__":
    main()
