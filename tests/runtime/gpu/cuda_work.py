"""Small pieces of work for cuda.core, the real one or the stand-in: memory, copies, a captured graph."""

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

import numpy as np

SIZE = 1024
THREADS, JOBS, ROUNDS = 4, 8, 20


def core() -> Any:
    return import_module("cuda.core")


def new_stream() -> Any:
    return core().Device(0).create_stream()


def device_memory(stream: Any, size: int = SIZE) -> Any:
    return core().Device(0).allocate(size, stream=stream)


def pinned_memory(value: int | None = None, size: int = SIZE) -> Any:
    """Pinned memory full of `value`; None leaves it as it comes."""
    block = core().LegacyPinnedMemoryResource().allocate(size)
    if value is not None:
        host_view(block)[:] = value
    return block


def host_view(buffer: Any) -> Any:
    return np.frombuffer((ctypes.c_uint8 * buffer.size).from_address(int(buffer.handle)), np.uint8)


def captured(stream: Any, work: Callable[[], Any]) -> Any:
    """The graph of some work; its builder is closed."""
    builder = stream.create_graph_builder().begin_building("thread_local")
    work()
    graph = builder.end_building().complete()
    builder.close()
    return graph


def work_on_threads() -> None:
    """Copies and graphs on several threads, each on a stream of its own; all that they take is closed again."""
    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(_copy_back_and_forth, range(JOBS)))


def _copy_back_and_forth(value: int) -> None:
    core().Device(0).set_current()
    stream = new_stream()
    source, target = pinned_memory(value), pinned_memory()
    for _ in range(ROUNDS):
        memory = device_memory(stream)
        memory.copy_from(source, stream=stream)
        graph = captured(stream, lambda memory=memory: target.copy_from(memory, stream=stream))
        graph.launch(stream)
        stream.sync()
        assert set(host_view(target).tolist()) == {value}
        graph.close()
        memory.close()
    for each in (stream, source, target):
        each.close()
