"""The command line: names every command, loads it when it is asked for, turns errors into one line and exit code 2."""

import signal
import sys
from collections.abc import Sequence
from types import FrameType

from cyclopts import App, CycloptsError
from rich.console import Console

from ilf_trt import __version__
from ilf_trt.errors import IlfError

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
app.command("ilf_trt.commands:build", name="build", help="Build a bundle from an ILF checkpoint.")
app.command("ilf_trt.runtime.command:generate", name="generate", help="Make pictures from a bundle, without PyTorch.")
app.command("ilf_trt.commands:plan", name="plan", help="Print a step plan and its cost.")
app.command("ilf_trt.commands:inspect", name="inspect", help="Show what a bundle holds.")
app.command("ilf_trt.runtime.command:verify", name="verify", help="Hold a bundle against its torch reference.")
app.command("ilf_trt.commands:train_demo", name="train-demo", help="Train the demo anew.")


def main(tokens: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, or 2 for an error that says what to do."""
    if tokens is None:
        signal.signal(signal.SIGTERM, _terminate)
    errors = Console(stderr=True, soft_wrap=True)
    try:
        app(tokens, exit_on_error=False, error_console=errors, result_action="return_value")
    except CycloptsError:
        return FAILED
    except IlfError as error:
        errors.print("error:", str(error), style="bold red", markup=False, highlight=False)
        return FAILED
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        errors.print(f"error: {where}{error.strerror or error}", style="bold red", markup=False, highlight=False)
        return FAILED
    except KeyboardInterrupt:
        errors.print("interrupted; nothing was left behind", style="bold red")
        return INTERRUPTED
    return 0


def _terminate(signum: int, frame: FrameType | None) -> None:
    """Unwind like an interrupt, so that drafts are removed."""
    sys.exit(TERMINATED)


if __name__ == "__main__":
    sys.exit(main())
