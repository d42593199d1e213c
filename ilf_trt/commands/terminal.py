"""Text for a terminal: lines as they are, and cells of tables that hold text of others."""

from rich.console import Console
from rich.text import Text

from ilf_trt.errors import shown

CELL_CHARS = 2000


def say(*lines: str, console: Console | None = None) -> None:
    """Print lines without markup, colours or line breaks of rich's making."""
    console = console or Console()
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def cell(*lines: str) -> Text:
    """Lines of one cell; control characters are escaped, markup stays text."""
    return Text("\n".join(shown(line, CELL_CHARS) for line in lines))
