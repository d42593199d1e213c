"""The measured machine: its facts, its clock, and the rates that its matrix units and copies reach.

All rates are for random data, timed by CUDA events. A dry run uses the CPU and the host's clock.
"""

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ilf_trt.errors import DeviceError, DeviceLost, IlfError
from ilf_trt.runtime.gpu.cuda import Gpu

MIB = 1 << 20
TERA, GIGA = 1e12, 1e9
DRY_RUN = "none, a dry run on the CPU"
SQUARES = (4096, 8192, 16384)
MODEL_SHAPES = ((8192, 1152, 1152), (8192, 1152, 4608), (8192, 4608, 1152), (512, 1152, 4608))  # rows, in, out
DRY_SQUARES = (64, 128)
COPY_BYTES, SMALL_COPY_BYTES = 1 << 30, 1 << 20
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
SAMPLES, WARM_UPS, SAMPLE_MS = 15, 3, 5.0

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Shot:
    """One generation: its latents (B, C, H, W) and its times.

    `denoise_ms` is the device's time from the first run to the last, `end_to_end_ms` the host's time from arrays to
    arrays, `launch_us` the host's time to launch it all. `captured` says whether an engine library ran it as one CUDA
    graph; it is None for torch.
    """

    latents: NDArray[np.float32]
    denoise_ms: float
    end_to_end_ms: float
    launch_us: float | None
    captured: bool | None = None


class Machine:
    """The GPU `cuda:0`, or in a dry run the CPU."""

    def __init__(self, *, dry_run: bool) -> None:
        """Raises DeviceError if torch sees no GPU, except in a dry run."""
        if not dry_run and not torch.cuda.is_available():
            raise DeviceError("torch sees no GPU here; run on a GPU host, or pass --dry-run to try the flow on the CPU")
        self.dry_run = dry_run
        self.device = "cpu" if dry_run else "cuda:0"
        self.gpu = DRY_RUN if dry_run else torch.cuda.get_device_name(0)

    @property
    def description(self) -> str:
        """The GPU, its driver, and the CUDA version of torch."""
        if self.dry_run:
            return f"no GPU ({DRY_RUN})"
        return f"{self.gpu}, driver {self._driver()}, CUDA {torch.version.cuda}"

    @property
    def architecture(self) -> str:
        """The compute capability, such as sm90 for Hopper; empty without a GPU."""
        return "" if self.dry_run else "sm{}{}".format(*torch.cuda.get_device_capability(0))

    def sync(self) -> None:
        if not self.dry_run:
            torch.cuda.synchronize()

    def mark(self) -> Any:
        """A point in the device's time."""
        if self.dry_run:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed_ms(self, first: Any, last: Any) -> float:
        """The time between two marks; waits for the last one."""
        if self.dry_run:
            return float(last - first) * 1000
        last.synchronize()
        return float(first.elapsed_time(last))

    def shoot(
        self, run: Callable[[Mapping[str, Tensor], Tensor], Tensor], conditions: Mapping[str, Tensor], noise: Tensor
    ) -> Shot:
        """Time one generation in torch: copy the inputs to the device, `run`, copy the latents back."""
        self.sync()
        start_s = perf_counter()
        on_device = {name: value.to(self.device) for name, value in conditions.items()}
        noise = noise.to(self.device)
        first, launch_s = self.mark(), perf_counter()
        latents = run(on_device, noise)
        launch_us = (perf_counter() - launch_s) * 1e6
        last = self.mark()
        array = latents.cpu().numpy()
        end_to_end_ms = (perf_counter() - start_s) * 1000
        return Shot(array, self.elapsed_ms(first, last), end_to_end_ms, launch_us)

    def check(self) -> None:
        """Raise DeviceLost if CUDA refuses all work from now on, so that no later row gets the blame."""
        if self.dry_run:
            return
        try:
            torch.ones(1, device=self.device).add_(1).cpu()
        except RuntimeError as error:
            raise DeviceLost(f"{self.gpu} is lost ({_line(error)}); run the same command again") from error

    def used_mib(self) -> float | None:
        """Memory of the GPU that any process uses; None without a GPU."""
        if self.dry_run:
            return None
        free, total = torch.cuda.mem_get_info()
        return (total - free) / MIB

    def free(self) -> None:
        """Free the memory that torch caches on the GPU."""
        if not self.dry_run:
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def facts(self) -> list[Row]:
        """Rows of facts: memory, architecture, driver and so on."""
        if self.dry_run:
            return []
        properties = torch.cuda.get_device_properties(0)
        facts = {
            "memory, MiB": properties.total_memory // MIB,
            "multiprocessors": properties.multi_processor_count,
            "L2 cache, MiB": getattr(properties, "L2_cache_size", 0) // MIB,
            "architecture": self.architecture,
            "driver": self._driver(),
            "CUDA of torch": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(),
        }
        return [_row(what, "", value, value, "", 1) for what, value in facts.items()]

    def rates(self) -> list[Row]:
        """Rows of rates: matrix products in every dtype and every kind of copy; an error becomes a note in its row."""
        squares = DRY_SQUARES if self.dry_run else SQUARES
        shapes = [(n, n, n) for n in squares] + ([] if self.dry_run else list(MODEL_SHAPES))
        makers = {
            name: _product(dtype, self.device) for name, dtype in DTYPES.items() if name != "fp32" or self.dry_run
        }
        makers["fp8"] = _fp8_product(self.device)
        rows = []
        for name, make in makers.items():
            for m, k, n in shapes:
                rows.append(
                    self.rate(f"matmul {name}", f"{m}x{k}x{n}", make, (m, k, n), 2 * m * k * n / TERA, "TFLOP/s")
                )
                self.free()
        size = SMALL_COPY_BYTES if self.dry_run else COPY_BYTES
        for what, moved in (
            ("host to device, pinned", 1),
            ("device to host, pinned", 1),
            ("device, read and write", 2),
        ):
            make = _copy(what, self.device)
            rows.append(self.rate(f"copy {what}", f"{size // MIB} MiB", make, (size,), moved * size / GIGA, "GB/s"))
            self.free()
        return rows

    def rate(
        self,
        what: str,
        size: str,
        make: Callable[..., Callable[[], Any]],
        shape: tuple[int, ...],
        work: float,
        unit: str,
    ) -> Row:
        """The best and the median rate of `make(*shape)()`, a call that does `work` units; an error becomes a note."""
        try:
            call = make(*shape)
            for _ in range(WARM_UPS):
                call()
            once_ms = max(self._time_ms(call, 1), 1e-4)
            calls = max(1, round(SAMPLE_MS / once_ms))
            times_ms = [self._time_ms(call, calls) for _ in range(SAMPLES)]
        except (RuntimeError, AttributeError, ImportError, TypeError, ValueError) as error:
            return _row(what, size, "", "", unit, 0, _line(error))
        best, median = (work / (value / 1000) for value in (min(times_ms), float(np.median(times_ms))))
        return _row(what, size, f"{best:.4g}", f"{median:.4g}", unit, SAMPLES)

    def _time_ms(self, call: Callable[[], Any], calls: int) -> float:
        """The mean time of `calls` consecutive calls."""
        self.sync()
        first = self.mark()
        for _ in range(calls):
            call()
        return self.elapsed_ms(first, self.mark()) / calls

    def _driver(self) -> str:
        try:
            return ".".join(map(str, Gpu.open(0).driver))
        except IlfError:
            return "unknown"


def measured_rate(rows: list[dict[str, str]], gpu: str, dtype: str) -> float | None:
    """The best median of square products in `dtype` on this GPU, in TFLOP/s; None without a measurement."""
    rates = [
        float(row["median"])
        for row in rows
        if row["gpu"] == gpu
        and row["what"] == f"matmul {dtype}"
        and row["median"]
        and len(set(row["size"].split("x"))) == 1
    ]
    return max(rates, default=None)


def _row(what: str, size: str, best: Any, median: Any, unit: str, n: int, note: str = "") -> Row:
    return {"what": what, "size": size, "best": best, "median": median, "unit": unit, "n": n, "note": note}


def _product(dtype: torch.dtype, device: str) -> Callable[..., Callable[[], Any]]:
    def make(m: int, k: int, n: int) -> Callable[[], Any]:
        a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
        out = torch.empty(m, n, device=device, dtype=dtype)
        return lambda: torch.mm(a, b, out=out)

    return make


def _fp8_product(device: str) -> Callable[..., Callable[[], Any]]:
    """E4M3 by E4M3 with one scale a tensor and fast accumulation, as in the engines."""

    def make(m: int, k: int, n: int) -> Callable[[], Any]:
        a = torch.randn(m, k, device=device).to(torch.float8_e4m3fn)
        b = torch.randn(n, k, device=device).to(torch.float8_e4m3fn).t()  # the library takes columns
        one = torch.ones((), device=device)
        scaled = torch._scaled_mm
        return lambda: scaled(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

    return make


def _copy(what: str, device: str) -> Callable[..., Callable[[], Any]]:
    def make(size: int) -> Callable[[], Any]:
        on_device = torch.zeros(size, dtype=torch.uint8, device=device)
        if what.startswith("device, "):
            source, target = torch.ones_like(on_device), on_device
        else:
            on_host = torch.zeros(size, dtype=torch.uint8, pin_memory=device != "cpu")
            source, target = (on_host, on_device) if what.startswith("host") else (on_device, on_host)
        return lambda: target.copy_(source, non_blocking=True)

    return make


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
