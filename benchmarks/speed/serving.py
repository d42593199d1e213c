"""The cost of a serving process: cold start to the first picture, peak memory, and growth over 200 generations.

    python -m benchmarks.speed.serving [--models demo demo-emoji large] [--repeats 5]

`large` is a PixArt pipeline with random weights. Its text encoder, transformer and decoder are large enough to show the
effect of `low_memory`. Every measurement runs in a new process.
"""

import argparse
import json
import resource
import shlex
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.record import write_rows
from ilf_trt.process_memory import peak_mib

MIB = 1 << 20
CALLS, WARM_UP = 200, 20
REQUEST_OF: dict[str, dict[str, Any]] = {"demo": {"class_labels": [3]}}
PROMPT = {"prompt": "smiling cat"}
LARGE = {"text_layers": 12, "text_width": 768, "blocks": 12, "width": 768}


def child(mode: str, bundle: str, request: dict[str, Any]) -> dict[str, float]:
    """Measure inside the process: `cold` and `low` generate one picture, `calls` generates many."""
    from ilf_trt.runtime import Pipeline

    with Pipeline.load(bundle, threads=1, sessions=1, low_memory=mode == "low") as pipeline:
        pipeline.generate(seed=0, **request)
        if mode != "calls":
            return {"peak_mib": peak_mib()}
        for _ in range(WARM_UP):
            pipeline.generate(seed=0, **request)
        before_mib = resident_mib()
        tracemalloc.start()
        pipeline.generate(seed=0, **request)
        before_bytes = tracemalloc.get_traced_memory()[0]
        for _ in range(CALLS):
            pipeline.generate(seed=0, **request)
        growth_bytes = tracemalloc.get_traced_memory()[0] - before_bytes
        return {"python_bytes_a_call": growth_bytes / CALLS, "resident_growth_mib": resident_mib() - before_mib}


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / MIB


def run(mode: str, bundle: Path, request: dict[str, Any]) -> tuple[dict[str, float], float]:
    """The numbers of a process, and the seconds from its start to its end."""
    start_s = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.speed.serving", "--child", mode, str(bundle), json.dumps(request)]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(process.stdout.splitlines()[-1]), time.perf_counter() - start_s


def large(folder: Path) -> Path:
    """A bundle whose parts have about 330, 440 and 190 MiB."""
    import torch
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
    from transformers import AutoTokenizer, T5Config, T5EncoderModel

    from ilf_trt import attach, save_ilf
    from ilf_trt.assembly.conductor import build
    from ilf_trt.assembly.options import BuildOptions
    from ilf_trt.contract.packaged import EMOJI

    width = LARGE["text_width"]
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(EMOJI.folder / "tokenizer")
    encoder = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=width, d_ff=2048, num_layers=LARGE["text_layers"], num_heads=12)
    )
    transformer = PixArtTransformer2DModel(
        num_attention_heads=12,
        attention_head_dim=LARGE["width"] // 12,
        in_channels=4,
        out_channels=8,
        num_layers=LARGE["blocks"],
        sample_size=16,
        cross_attention_dim=LARGE["width"],
        caption_channels=width,
    )
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    )
    pipeline = PixArtAlphaPipeline(tokenizer, encoder, vae, transformer, DPMSolverMultistepScheduler())
    pipeline.save_pretrained(folder / "pipeline")
    save_ilf(attach(transformer, (3, 7)), folder / "checkpoint", base="../pipeline/transformer")
    options = BuildOptions(pipeline=folder / "pipeline", steps=4, verify=False)
    return build(str(folder / "checkpoint"), folder / "large.ilf", options).bundle.path


def measure(name: str, bundle: Path, repeats: int) -> dict[str, Any]:
    request = REQUEST_OF.get(name, PROMPT)
    cold = [run("cold", bundle, request) for _ in range(repeats)]
    low = [run("low", bundle, request) for _ in range(repeats)]
    calls = run("calls", bundle, request)[0] if name != "large" else {}
    cold_s = [seconds for _, seconds in cold]
    return {
        "model": name,
        "bundle_mib": round(sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file()) / MIB, 1),
        "repeats": repeats,
        "cold_start_s": round(median(cold_s), 3),
        "cold_start_min": round(min(cold_s), 3),
        "cold_start_max": round(max(cold_s), 3),
        "peak_mib": round(median(numbers["peak_mib"] for numbers, _ in cold), 1),
        "low_memory_peak_mib": round(median(numbers["peak_mib"] for numbers, _ in low), 1),
        "low_memory_s": round(median(seconds for _, seconds in low), 3),
        "calls": CALLS if calls else "",
        "python_bytes_a_call": round(calls["python_bytes_a_call"], 1) if calls else "",
        "resident_growth_mib": round(calls["resident_growth_mib"], 2) if calls else "",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["demo", "demo-emoji", "large"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        mode, bundle, request = options.child
        print(json.dumps(child(mode, bundle, json.loads(request))))
        return
    from ilf_trt.assembly.packaged_bundle import bundle_of

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            bundle = large(Path(folder)) if name == "large" else bundle_of(name, Path(folder))
            rows.append(measure(name, bundle, options.repeats))
            print(rows[-1], flush=True)
    print(write_rows("serving", shlex.join(["python", "-m", "benchmarks.speed.serving", *sys.argv[1:]]), rows))


if __name__ == "__main__":
    main()
