"""Progress: the one signature by which any long work tells its caller how far it is."""

from typing import Protocol


class Progress(Protocol):
    """Called with what runs now, how many of all parts are done, and a detail such as the loss."""

    def __call__(self, what: str, done: int, total: int, detail: str = "", /) -> None: ...


def no_progress(what: str, done: int, total: int, detail: str = "", /) -> None:
    """Tells nobody."""
