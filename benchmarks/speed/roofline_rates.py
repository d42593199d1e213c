"""The rates that the roofline computes with: published ones with their source, or measured ones if a CSV has them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.speed.block_work import Attention, Product
from benchmarks.speed.gpu_tables import is_gpu
from benchmarks.speed.machine import measured_rate
from benchmarks.speed.rates import BACKENDS, DEFAULT, attention_name, attention_size, product_name, product_size

TERA, GIGA, MICRO = 1e12, 1e9, 1e6
FP16, FP8 = "fp16", "fp8"
OPERAND_BYTES = {FP16: 2, FP8: 1}
RESULT_BYTES = 2
PUBLISHED = "published"
COPY = "copy device, read and write"


@dataclass(frozen=True, slots=True)
class Hopper:
    """Dense peak rates and published measurements of a GPU: products in TFLOP/s, memory in TB/s."""

    name: str
    product_peak: Mapping[str, float]
    memory_peak: float
    product: Mapping[str, float]
    memory: float


# Peaks: NVIDIA's data sheets of H100 SXM and H200 SXM. FP16 product: bfloat16, 4,096 cubed, sm_90, in OpenXLA's table
# xla/service/gpu/model/matmul_interpolator_data.h. FP8 product (cuBLASLt, 4,096 cubed) and memory (triad): results of
# ND H100 v5 and ND H200 v5 in Azure's AI-benchmarking-guide.
GPUS = (
    Hopper("H100 SXM", {FP16: 989, FP8: 1979}, 3.35, {FP16: 783, FP8: 1217}, 2.97),
    Hopper("H200", {FP16: 989, FP8: 1979}, 4.8, {FP16: 783, FP8: 1249}, 4.18),
)
MULTIPROCESSORS = 132  # NVIDIA's data sheets
# A tile's rows and outputs, and its share of the rate; fitted to OpenXLA's table, which a test compares.
TILES = ((128, 128, 1.0), (64, 128, 0.85), (64, 64, 0.65))

# FlashAttention-3 (arXiv 2407.08608), H100 SXM, forward, no causal mask, TFLOP/s by sequence length: the faster of
# FlashAttention-3 and cuDNN in figures 5a (head size 64), 5c and 9c (128), and FlashAttention-2 in figure 5c.
FUSED = {
    FP16: {512: 497, 1024: 574, 2048: 625, 4096: 638},
    FP8: {512: 617, 1024: 751, 2048: 886, 4096: 918},
}
FUSED_64 = {512: 335, 1024: 392, 2048: 460, 4096: 476}
FLASH_2 = {512: 309, 1024: 350, 2048: 362, 4096: 368}
# torch's memory-efficient kernel, the one that takes a mask, against its flash kernel: microsoft/onnxruntime pull
# request 21629, H100, 144.8 and 229.5 TFLOP/s.
MASKED_SHARE = 0.63
PADDED, PADDED_LESS = 128, 80  # head size 72 inside the kernels of TensorRT-RTX's plans, and a smaller multiple of 16
FLASH_2_PADDED = 96  # FlashAttention-2 has kernels for 64, 96, 128, …

# From kernel to kernel in a CUDA graph: a captured sum of 1,024 numbers takes 1.1 to 1.3 µs, pytorch issue 161104.
CAPTURED_US = 1.2
# The host's time for an operation of eager torch: the least of 5 to 25 µs in "From PyTorch op to kernel launch",
# jiahuanglin.xyz. More would make eager torch slower.
EAGER_LAUNCH_US = 5.0


@dataclass(frozen=True, slots=True)
class GpuRates:
    """The rates of a GPU; `used` collects the kinds of measured rates that an answer took."""

    gpu: Hopper
    measured: Mapping[tuple[str, str], float]
    square: Mapping[str, float | None]
    used: set[str]

    @classmethod
    def of(cls, gpu: Hopper, facts: list[dict[str, str]], rates: list[dict[str, str]]) -> "GpuRates":
        """The published rates of `gpu`, and the measured ones of `gpu-facts.csv` and `gpu-rates.csv`."""
        own = [row for row in [*facts, *rates] if is_gpu(gpu.name, row["gpu"])]
        measured = {
            (row["what"], "" if row["what"] == COPY else row["size"]): float(row["median"])
            for row in own
            if row["unit"] and row["median"]
        }
        names = {row["gpu"] for row in own}
        square = {
            precision: max((rate for name in names if (rate := measured_rate(own, name, precision))), default=None)
            for precision in (FP16, FP8)
        }
        return cls(gpu, measured, square, set())

    @property
    def source(self) -> str:
        """Where the rates of the answers so far come from."""
        return f"measured {', '.join(sorted(self.used))}; else {PUBLISHED}" if self.used else PUBLISHED

    def square_flop_per_us(self, precision: str) -> float:
        """Operations a microsecond of large square products."""
        measured = self.square[precision]
        if measured:
            self.used.add("matmul")
        return (measured or self.gpu.product[precision]) * TERA / MICRO

    def product_us(self, product: Product, precision: str) -> float:
        """A Linear without the gap before it."""
        size = product_size(product.rows, product.inputs, product.outputs)
        measured = self._measured(product_name(precision), size)
        if measured:
            return _without_gap(product.flop, measured)
        flop_per_us = self.square_flop_per_us(precision)
        arithmetic = tiled_flop(product.rows, product.inputs, product.outputs) / flop_per_us
        return max(arithmetic, self.bytes_us(product.bytes_moved(OPERAND_BYTES[precision], RESULT_BYTES)))

    def attention_us(self, attention: Attention, precision: str, head_size: int = PADDED) -> float:
        """An engine's attention, with its heads padded to `head_size`, without the gap before it."""
        # torch's kernel for masks is not the one of an engine
        measured = None if attention.masked else self._fused(attention, precision, head_size, list(BACKENDS))
        if measured:
            return _without_gap(attention.flop(head_size), measured)
        rate = by_length(FUSED[precision], attention.queries)
        if head_size < PADDED:
            rate *= _share_of_128(attention.queries, head_size)
        arithmetic = attention.flop(head_size) / (rate * TERA / MICRO)
        return max(arithmetic, self.bytes_us(attention.bytes_moved(OPERAND_BYTES[precision], RESULT_BYTES)))

    def eager_attention_us(self, attention: Attention) -> float:
        """torch's own attention in float16, without the gap before it."""
        measured = self._fused(attention, FP16, attention.head_size, [DEFAULT])
        if measured:
            return _without_gap(attention.flop(), measured)
        rate = by_length(FLASH_2, attention.queries) * (MASKED_SHARE if attention.masked else 1.0)
        return attention.flop(FLASH_2_PADDED) / (rate * TERA / MICRO)

    def bytes_us(self, moved: float) -> float:
        """The time to move bytes between the GPU and its memory."""
        measured = self._measured(COPY, "")
        return moved / (measured * GIGA if measured else self.gpu.memory * TERA) * MICRO

    def _fused(self, attention: Attention, precision: str, head_size: int, backends: list[str]) -> float | None:
        size = attention_size(attention.queries, attention.keys, head_size, masked=attention.masked)
        rates = [self._measured(attention_name(precision, backend), size) for backend in backends]
        return max((rate for rate in rates if rate), default=None)

    def _measured(self, what: str, size: str) -> float | None:
        rate = self.measured.get((what, size))
        if rate:
            self.used.add(what.partition(" ")[0])
        return rate


def tiled_flop(rows: int, inputs: int, outputs: int) -> float:
    """The operations of a product, stretched by what its best tiles leave idle.

    Tiles run in waves of one for each multiprocessor; a last wave that is not full takes as long as a full one.
    """
    flop = 2.0 * rows * inputs * outputs
    fills = []
    for tile_rows, tile_outputs, share in TILES:
        tiles = math.ceil(rows / tile_rows) * math.ceil(outputs / tile_outputs)
        whole = tiles / (math.ceil(tiles / MULTIPROCESSORS) * MULTIPROCESSORS)
        full = rows * outputs / (tiles * tile_rows * tile_outputs)
        fills.append(whole * full * share)
    return flop / max(fills)


def by_length(rates: Mapping[int, float], length: int) -> float:
    """The rate at a sequence length; those in between lie on a line, those outside have the rate at the end."""
    lengths = sorted(rates)
    if length <= lengths[0]:
        return rates[lengths[0]]
    for low, high in pairwise(lengths):
        if length <= high:
            return rates[low] + (rates[high] - rates[low]) * (length - low) / (high - low)
    return rates[lengths[-1]]


def _share_of_128(length: int, head_size: int) -> float:
    """The rate at a head size between 64 and 128, as a share of the rate at 128, on a line."""
    at_64 = by_length(FUSED_64, length) / by_length(FUSED[FP16], length)
    return at_64 + (1 - at_64) * (head_size - 64) / 64


def _without_gap(flop: float, tera_flop_per_s: float) -> float:
    return max(flop / (tera_flop_per_s * TERA) * MICRO - CAPTURED_US, 0.0)
