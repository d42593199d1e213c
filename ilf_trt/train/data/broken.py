"""The count of broken samples: the log names each once, and more than a limit are an error."""

import logging
from collections.abc import Mapping

from ilf_trt.errors import BrokenSample, DataError

SHOWN = 5
logger = logging.getLogger(__name__)


class BrokenCount:
    """Distinct broken samples with their reasons; the log named those in `known` before."""

    def __init__(self, limit: int, known: Mapping[str, str] | None = None) -> None:
        self.limit = limit
        self.reasons: dict[str, str] = dict(known or {})

    def add(self, broken: BrokenSample) -> None:
        """Count one sample; raises DataError if there are more than the limit."""
        if broken.key in self.reasons:
            return
        self.reasons[broken.key] = broken.reason
        logger.warning("skipped %s: %s", broken.key, broken.reason)
        if len(self.reasons) > self.limit:
            raise DataError(
                f"{len(self.reasons)} samples are broken, max_broken is {self.limit}; the last: {self.last()}; repair "
                "or remove them, or raise max_broken"
            )

    def last(self) -> str:
        """The newest SHOWN keys with their reasons."""
        return ", ".join(f"{key} ({reason})" for key, reason in list(self.reasons.items())[-SHOWN:])
