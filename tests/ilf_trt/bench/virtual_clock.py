"""A clock for threads that nobody waits for: time passes when every client sleeps."""

import threading
from threading import Condition, Event

from ilf_trt.bench.load import Clock

LOOK_S = 0.001  # of real time: how late a sleeper sees that another client has ended


class VirtualClock(Clock):
    """Time jumps to the next wake-up as soon as all living clients sleep; so a run takes milliseconds."""

    def __init__(self) -> None:
        self._now_s = 1000.0
        self._changed = Condition()
        self._wakes: dict[int, float] = {}

    def now_s(self) -> float:
        return self._now_s

    def sleep(self, seconds: float, stop: Event) -> None:
        self.pass_time(seconds, stop)

    def pass_time(self, seconds: float, stop: Event | None = None) -> None:
        """Sleep `seconds`: what a target does that works so long."""
        me = threading.get_ident()
        with self._changed:
            wake_s = self._now_s + seconds
            self._wakes[me] = wake_s
            while self._now_s < wake_s and not (stop is not None and stop.is_set()):
                if len(self._wakes) == _clients():
                    self._now_s = min(self._wakes.values())
                    self._changed.notify_all()
                if self._now_s < wake_s:
                    self._changed.wait(LOOK_S)
            del self._wakes[me]


def _clients() -> int:
    return sum(thread.name.startswith("client ") for thread in threading.enumerate())
