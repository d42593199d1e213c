"""Names every command, and loads it when it runs."""

from collections.abc import Sequence

from cyclopts import App, CycloptsError, UnknownCommandError

from ilf_trt import __version__, leaves
from ilf_trt.errors import InvalidRequest

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
        leaves.REPLAY,
        "replay",
        "Make a picture again from the record in its PNG, and say whether it is the same.",
        "build/demo.png",
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
        "ilf_trt.commands.bench:bench",
        "bench",
        "Measure a bundle against eager PyTorch, or under a stream of requests.",
        "build/demo.ilf --against eager --checkpoint demo",
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


def run(tokens: Sequence[str] | None) -> None:
    """Run one command, by default that of the process; raises InvalidRequest for a line that is none."""
    try:
        app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
    except UnknownCommandError as error:
        known = ", ".join(name for name in error.app or app if not name.startswith("-"))
        (word, *_) = error.unused_tokens or [""]
        raise InvalidRequest(f"{word!r} is no command; it takes {known}") from error  # cyclopts' own stops at eight
    except CycloptsError as error:
        raise InvalidRequest(str(error)) from error
