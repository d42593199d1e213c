"""Memory: what a job needs before it takes any, and how much it may take."""

from math import prod
from pathlib import Path

from ilf_trt.contract.manifest import Manifest
from ilf_trt.contract.ports import ITEM_BYTES, PICTURES
from ilf_trt.errors import InvalidRequest, told

from .picture.size import PictureSize
from .route import tensors_of
from .trajectory import Job

SHARE = 0.8  # of the machine's memory
NUMPY_BYTES = {**ITEM_BYTES, "bfloat16": 4}  # numpy holds it as float32
SHADE_COPIES = 3  # of one decoded picture in float32: the decoder's, the tiles put together, the scaled one
MIB, GIB = 1 << 20, 1 << 30
REMEMBERED = 1000
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class MemoryLimit:
    """The most bytes that one generation of a bundle may take on the host, engines not counted."""

    def __init__(self, manifest: Manifest, most_bytes: int, *, on_gpu: bool) -> None:
        self._manifest, self._most_bytes, self._on_gpu = manifest, most_bytes, on_gpu
        self._allowed: set[tuple[Job, int, PictureSize]] = set()

    def check(self, job: Job, pictures: int, size: PictureSize) -> None:
        """Raise InvalidRequest when `pictures` that run as batches of `job` need more than the limit."""
        key = (job, pictures, size)
        if key in self._allowed:
            return
        needed = host_bytes(self._manifest, pictures, size)
        needed += 0 if self._on_gpu else trajectory_bytes(self._manifest, job)
        if needed > self._most_bytes:
            height, width = size.requested
            raise InvalidRequest(
                f"{pictures} pictures of {height}x{width} in {len(job.plan.steps)} steps need {_size(needed)}, "
                f"the limit is {_size(self._most_bytes)}; ask for fewer, or pass a larger max_memory"
            )
        if len(self._allowed) >= REMEMBERED:
            self._allowed.clear()
        self._allowed.add(key)

    def check_smallest(self) -> None:
        """Raise InvalidRequest when not even the smallest job of the bundle is within the limit."""
        manifest = self._manifest
        size = PictureSize.of(manifest, None, binning=True)
        pictures = manifest.batch.min
        self.check(Job(manifest.plan, pictures, size.cells, manifest.spec.guidance), pictures, size)


def _size(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.3g} GiB" if size_bytes >= GIB else f"{size_bytes / MIB:.3g} MiB"


def limit_bytes(max_memory: int | None) -> int:
    """`max_memory` in bytes; None takes a share of the machine's. Raises InvalidRequest."""
    if max_memory is None:
        return int(machine_bytes() * SHARE)
    if isinstance(max_memory, bool) or not isinstance(max_memory, int) or max_memory < 1:
        raise InvalidRequest(f"max_memory is {told(max_memory)}, it must be a number of bytes, at least 1")
    return max_memory


def trajectory_bytes(manifest: Manifest, job: Job) -> int:
    """Bytes of every tensor that a trajectory is bound to."""
    return sum(prod(tensor.shape) * NUMPY_BYTES[tensor.dtype] for tensor in tensors_of(manifest, job).values())


def host_bytes(manifest: Manifest, pictures: int, size: PictureSize) -> int:
    """Bytes of what the caller gives and gets: conditions, noise, latents, and decoded pictures."""
    spec, shape = manifest.spec, (pictures, manifest.spec.latent[0], *size.cells)
    conditions = sum(prod(port.resolve({PICTURES: pictures})) * NUMPY_BYTES[port.dtype] for port in spec.conditions)
    pixels = 3 * (pictures * prod(size.requested) + SHADE_COPIES * 4 * max(prod(size.requested), prod(size.native)))
    return 2 * conditions + 3 * 4 * prod(shape) + (0 if manifest.decoder is None else pixels)


def machine_bytes() -> int:
    """The memory of this machine, or of the container if it has less."""
    pages = [line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal:")]
    limits = [int(pages[0].split()[1]) * 1024] if pages else [8 * GIB]
    for name in CGROUP_LIMITS:
        path = Path(name)
        text = path.read_text().strip() if path.is_file() else "max"
        if text.isdecimal():
            limits.append(int(text))
    return min(limits)
