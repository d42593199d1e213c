"""The command line: names every command, loads it when it runs, turns errors into one line and exit code 2."""

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from cyclopts import App, CycloptsError, UnknownCommandError
from rich.console import Console

from ilf_trt import __version__, leaves

from .errors import IlfError

FAILED = 2
INTERRUPTED = 130
TERMINATED = 143

app = App(
    name="ilf-trt",
    help="Train one feedback block, compile a few graphs, serve diffusion transformers without PyTorch.",
    version=__version__,
    help_format="markdown",
    suppress_keyboard_interrupt=False,
)
for _target, _name, _help, _example in (
    (
        "ilf_trt.commands.build:build",
        "build",
        "Build a bundle from an ILF checkpoint.",
        "--checkpoint demo -o build/demo.ilf",
    ),
    (
        leaves.GENERATE,
        "generate",
        "Make pictures from a bundle, without PyTorch.",
        "build/demo.ilf --labels 0-9 --seed 7 -o build/demo.png",
    ),
    (
        "ilf_trt.commands.plan:plan",
        "plan",
        "Print a step plan and its cost in block forwards.",
        "--blocks 28 --loop 8:19 --steps 10 --feedback outer:2",
    ),
    (
        "ilf_trt.commands.compile:compile",
        "compile",
        "Add engines to a bundle that was built elsewhere.",
        "model.ilf --target tensorrt",
    ),
    ("ilf_trt.commands.inspect:inspect", "inspect", "Show what a bundle holds.", "build/demo.ilf"),
    (
        leaves.VERIFY,
        "verify",
        "Hold every graph and one trajectory of a bundle against its torch reference.",
        "build/demo.ilf",
    ),
    (
        "ilf_trt.commands.prepare:prepare",
        "prepare",
        "Make latents and embedded text from pictures, to train on.",
        "--data-kind images --path photos --vae stabilityai/sd-vae-ft-ema -o build/latents",
    ),
    (
        "ilf_trt.commands.train:train",
        "train",
        "Train the feedback block of a recipe.",
        "--config demo --output build/demo-training",
    ),
    ("ilf_trt.commands.train_demo:train_demo", "train-demo", "Train the demo again.", "--output build/demo-checkpoint"),
):
    app.command(_target, name=_name, help=f"{_help}\n\nExample: `ilf-trt {_name} {_example}`")


cache = App(name="cache", help="List or remove what earlier builds left in the build cache.")
app.command(cache)
for _target, _name, _help, _example in (
    ("ilf_trt.commands.cache:list_cache", "ls", "List what the build cache holds.", ""),
    ("ilf_trt.commands.cache:prune_cache", "prune", "Remove builds from the build cache.", " --days 30"),
):
    cache.command(_target, name=_name, help=f"{_help}\n\nExample: `ilf-trt cache {_name}{_example}`")


def main(tokens: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, or 2 for an error that says what to do."""
    if tokens is None:
        signal.signal(signal.SIGTERM, _terminate)
        signal.signal(signal.SIGINT, _interrupt)
    errors = Console(stderr=True, soft_wrap=True)
    try:
        app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
    except UnknownCommandError as error:
        known = ", ".join(name for name in error.app or app if not name.startswith("-"))
        (word, *_) = error.unused_tokens or [""]
        message = f"error: {word!r} is no command; it takes {known}"  # cyclopts' own message stops at eight
        errors.print(message, style="bold red", markup=False, highlight=False)
        return FAILED
    except (CycloptsError, IlfError) as error:
        errors.print("error:", str(error), style="bold red", markup=False, highlight=False)
        return FAILED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        errors.print(f"error: {where}{error.strerror or error}", style="bold red", markup=False, highlight=False)
        return FAILED
    except KeyboardInterrupt:
        errors.print("interrupted; nothing was left behind", style="bold red")
        return INTERRUPTED
    return 0


class _Interrupt(KeyboardInterrupt):
    """CPython ends a process by signal 2, whatever main returned, once a plain one has passed through an exec."""


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise _Interrupt


def _terminate(signum: int, frame: FrameType | None) -> None:
    """Unwind like an interrupt, so that drafts are removed."""
    sys.exit(TERMINATED)


if __name__ == "__main__":
    sys.exit(main())
