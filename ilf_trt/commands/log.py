"""What a command logs, on standard error: warnings, one line each."""

import logging

from ilf_trt.errors import MESSAGE_CHARS, shown


def log_to_terminal() -> None:
    """Show warnings of the package and of its libraries; does nothing if somebody configured logging before."""
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return shown(record.getMessage(), MESSAGE_CHARS)
