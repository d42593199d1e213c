"""Commands in processes of their own, forked from a process that has torch loaded, so that they start at once."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import sklearn.datasets  # noqa: F401  (what a training imports late)
import torch
import torch.utils.tensorboard

import ilf_trt.train.run  # noqa: F401
from ilf_trt.cli import main

FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(["tests.warm_process"])


@contextmanager
def start_command(arguments: list[str], error_file: Path) -> Iterator[ForkServerProcess]:
    """`ilf-trt` with one thread, its standard error in a file; killed if it still runs when the block ends."""
    process = FORKS.Process(target=_run, args=(arguments, error_file))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()
        process.close()


def _run(arguments: list[str], error_file: Path) -> None:
    with error_file.open("w") as errors, Path(os.devnull).open("w") as nowhere:
        os.dup2(errors.fileno(), 2)
        os.dup2(nowhere.fileno(), 1)
    torch.set_num_threads(1)
    sys.argv = ["ilf-trt", *arguments]
    sys.exit(main())
