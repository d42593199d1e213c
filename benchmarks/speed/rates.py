"""The rates of a block's kernels on a GPU: fused attention by head size, and the Linears of DiT-XL/2 and PixArt.

    python -m benchmarks.speed.rates                 # needs a GPU, takes less than a minute
    python -m benchmarks.speed.roofline              # computes the roofline again with these rates
    python -m benchmarks.tables

Every rate is that of consecutive calls in one CUDA graph, timed by CUDA events, so it includes the gaps between kernels
but no launch by the host. A Linear reads other weights in each call, as in a model, so they come from memory and not
from the cache. Rates of attention count the useful operations at the named head size. `--dry-run` runs everything on
the CPU in tiny sizes and writes to --output alone; its numbers measure nothing.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.record import RESULTS, Records
from benchmarks.speed.gpu_tables import RATES
from benchmarks.speed.machine import DRY_RUN, TERA, Machine, Row
from ilf_trt.errors import DeviceError

RATES_KEY = ("gpu", "what", "size")
DRY_OUTPUT = Path("build/gpu-dry-run")
BUDGET_S = 55.0  # the rows that would begin later say so

WIDTH, HEADS, ROWS = 1152, 16, 2  # of DiT-XL/2 and PixArt; two rows are one picture with guidance
TOKENS, HEAD_SIZES, TEXTS = (256, 1024, 4096), (72, 80, 96, 128), (120, 300)
DRY_WIDTH, DRY_HEADS, DRY_TOKENS, DRY_HEAD_SIZES, DRY_TEXTS = 32, 2, (16,), (8, 16), (8,)
FILLED_WIDTH, DRY_FILLED_WIDTH = 1280, 48  # with heads filled up for the FP8 attention of TensorRT
MASKED_HEAD_SIZE, DRY_MASKED_HEAD_SIZE = 72, 8

CALLS, DRY_CALLS = 20, 2  # in a CUDA graph
WEIGHT_COPIES_BYTES = 1 << 28  # several times the 50 MB of the cache
FP16, FP8 = "fp16", "fp8"
DEFAULT = "default"
BACKENDS = {DEFAULT: None, "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}

Call = Callable[[], Any]
Rate = tuple[str, str, Callable[[], Call], float]


def product_name(precision: str) -> str:
    return f"linear {precision}"


def product_size(rows: int, inputs: int, outputs: int) -> str:
    return f"{rows}x{inputs}x{outputs}"


def attention_name(precision: str, backend: str) -> str:
    """`backend` is one of `BACKENDS`: torch's choice, or one of its libraries."""
    return f"attention {precision} {backend}"


def attention_size(queries: int, keys: int, head_size: int, *, masked: bool = False) -> str:
    return f"{queries}x{keys}, heads of {head_size}{', masked' * masked}"


def record_rates(machine: Machine, records: Records, command: str) -> list[Row]:
    """Measure every rate and write `gpu-rates.csv`; rows of the same GPU are replaced."""
    end_s, rows = monotonic() + BUDGET_S, []
    try:
        with torch.inference_mode():
            for what, size, make, flop in _rates(machine):
                if monotonic() > end_s:
                    empty = {"best": "", "median": "", "unit": "TFLOP/s", "n": 0}
                    rows.append({"what": what, "size": size, **empty, "note": f"left out after {BUDGET_S:.0f} s"})
                    continue
                rows.append(machine.rate(what, size, make, (), flop / TERA, "TFLOP/s"))
                if rows[-1]["note"]:
                    machine.check()
                machine.free()
    finally:
        restore = getattr(torch.nn.attention, "restore_flash_attention_impl", None)  # torch 2.11 and later
        if restore is not None:
            restore()
    rows = [{"gpu": machine.gpu, **row} for row in rows]
    records.append(RATES, command, rows, key=RATES_KEY)
    return rows


def _rates(machine: Machine) -> Iterator[Rate]:
    """The name, the size, the maker and the operations of every rate; FP8 attention last, for it changes torch."""
    dry = machine.dry_run
    width, heads = (DRY_WIDTH, DRY_HEADS) if dry else (WIDTH, HEADS)
    tokens, head_sizes, texts = (DRY_TOKENS, DRY_HEAD_SIZES, DRY_TEXTS) if dry else (TOKENS, HEAD_SIZES, TEXTS)
    layers = [(width, width), (width, 3 * width), (width, 4 * width), (4 * width, width)]  # q or out, qkv, up, down
    shapes = [(ROWS * n, *layer) for n in tokens for layer in layers]
    shapes += [(ROWS * text, width, outputs) for text in texts for outputs in (width, 2 * width)]  # k or v, both
    wide = DRY_FILLED_WIDTH if dry else FILLED_WIDTH
    filled = [(ROWS * n, *layer) for n in tokens for layer in ((width, wide), (width, 3 * wide), (wide, width))]
    filled += [(ROWS * text, width, 2 * wide) for text in texts]
    calls = DRY_CALLS if dry else CALLS
    for precision, product, chosen in ((FP16, _product, shapes), (FP8, _fp8_product, [*shapes, *filled])):
        for shape in chosen:
            make = _captured(machine, calls, lambda product=product, shape=shape: product(*shape, machine))
            yield product_name(precision), product_size(*shape), make, calls * 2.0 * shape[0] * shape[1] * shape[2]

    def attention(precision: str, backend: str, queries: int, keys: int, head_size: int, masked: bool) -> Rate:
        def new() -> Iterator[Call]:
            sizes = (heads, queries, keys, head_size)
            return _fp8_attention(*sizes, machine) if precision == FP8 else _attention(*sizes, backend, masked, machine)

        flop = calls * 4.0 * ROWS * heads * queries * keys * head_size
        size = attention_size(queries, keys, head_size, masked=masked)
        return attention_name(precision, backend), size, _captured(machine, calls, new), flop

    for backend in BACKENDS:
        for n in tokens:
            for head_size in head_sizes:
                yield attention(FP16, backend, n, n, head_size, False)
    for n in tokens:
        for text in texts:
            yield attention(FP16, DEFAULT, n, text, DRY_MASKED_HEAD_SIZE if dry else MASKED_HEAD_SIZE, True)
    for n in tokens:
        for head_size in head_sizes:
            yield attention(FP8, DEFAULT, n, n, head_size, False)


def _captured(machine: Machine, calls: int, new: Callable[[], Iterator[Call]]) -> Callable[[], Call]:
    """Makes a call that runs the next `calls` of `new()`: as one CUDA graph, on the CPU one by one."""

    def make() -> Call:
        work = list(islice(new(), calls))

        def run() -> None:
            for call in work:
                call()

        if machine.dry_run:
            return run
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()  # the libraries choose and load their kernels
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()

        def replay() -> None:
            graph.replay()

        replay.work = work  # type: ignore[attr-defined]  # the tensors that the graph reads
        return replay

    return make


def _copies(inputs: int, outputs: int, element_bytes: int, machine: Machine) -> int:
    return 2 if machine.dry_run else max(2, WEIGHT_COPIES_BYTES // (inputs * outputs * element_bytes))


def _product(rows: int, inputs: int, outputs: int, machine: Machine) -> Iterator[Call]:
    kind = {"device": machine.device, "dtype": torch.float16}
    tokens, result = torch.randn(rows, inputs, **kind), torch.empty(rows, outputs, **kind)
    weights = [torch.randn(outputs, inputs, **kind) for _ in range(_copies(inputs, outputs, 2, machine))]
    while True:
        for weight in weights:
            yield lambda weight=weight: torch.mm(tokens, weight.t(), out=result)


def _fp8_product(rows: int, inputs: int, outputs: int, machine: Machine) -> Iterator[Call]:
    """E4M3 by E4M3 with one scale a tensor and fast accumulation to float16, as in the engines."""

    def quantised(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=machine.device).to(torch.float8_e4m3fn)

    tokens, one = quantised(rows, inputs), torch.ones((), device=machine.device)
    weights = [quantised(outputs, inputs).t() for _ in range(_copies(inputs, outputs, 1, machine))]
    scaled = torch._scaled_mm
    options = {"scale_a": one, "scale_b": one, "out_dtype": torch.float16, "use_fast_accum": True}
    while True:
        for weight in weights:
            yield lambda weight=weight: scaled(tokens, weight, **options)


def _attention(
    heads: int, queries: int, keys: int, head_size: int, backend: str, masked: bool, machine: Machine
) -> Iterator[Call]:
    """Attention in float16, laid out as a model's projections leave it: (R, N, H, d), seen as (R, H, N, d)."""
    query, key, value = (
        torch.randn(ROWS, n, heads, head_size, device=machine.device, dtype=torch.float16).transpose(1, 2)
        for n in (queries, keys, keys)
    )
    mask = torch.zeros(ROWS, 1, 1, keys, device=machine.device, dtype=torch.float16) if masked else None
    if mask is not None:
        mask = mask.expand(ROWS, heads, queries, keys)
    library = BACKENDS[backend]

    def call() -> Any:
        if library is None:
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        with sdpa_kernel(library):
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    while True:
        yield call


def _fp8_attention(heads: int, queries: int, keys: int, head_size: int, machine: Machine) -> Iterator[Call]:
    """Attention in E4M3 by FlashAttention-3; raises RuntimeError or ImportError where torch has none."""
    from torch.nn.attention import activate_flash_attention_impl
    from torch.nn.attention.experimental import _scaled_dot_product_attention_quantized as quantized

    activate_flash_attention_impl("FA3")
    query, key, value = (
        torch.randn(ROWS, n, heads, head_size, device=machine.device).to(torch.float8_e4m3fn).transpose(1, 2)
        for n in (queries, keys, keys)
    )
    one = torch.ones(ROWS, heads, device=machine.device)
    attend = quantized._scaled_dot_product_attention_quantized
    while True:
        yield lambda: attend(query, key, value, q_descale=one, k_descale=one, v_descale=one)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder for a copy of the file")
    parser.add_argument("--commit", default="", help="commit for the rows, on a machine without git")
    parser.add_argument("--dry-run", action="store_true", help="run everything on the CPU in tiny sizes")
    options = parser.parse_args(arguments)
    try:
        machine = Machine(dry_run=options.dry_run)
    except DeviceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    gpu = f"no GPU, {DRY_RUN}" if options.dry_run else machine.description
    folder, copies = RESULTS, options.output
    if options.dry_run:
        folder, copies = options.output or DRY_OUTPUT, None
    command = shlex.join(
        ["python", "-m", "benchmarks.speed.rates", *(sys.argv[1:] if arguments is None else arguments)]
    )
    for row in record_rates(machine, Records(folder, gpu, copies, options.commit), command):
        print(" ".join(f"{column}={value}" for column, value in row.items() if value != ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
