"""A process that measures, as its parent sees it: started, asked, and ended."""

from time import perf_counter
from typing import Any

from ilf_trt.child_process import ChildProcess, error_of
from ilf_trt.errors import EngineError


class Worker(ChildProcess):
    """One process; its module answers requests as `answering.serve` does. `process_s` is the time of its start."""

    def __init__(self, module: str, *, threads: int = 0) -> None:
        """Start `python -m MODULE`; with `threads`, libraries of the process use so many."""
        begin_s = perf_counter()
        self._module = module
        super().__init__(module, {"OMP_NUM_THREADS": str(threads)} if threads else {})
        try:
            self.facts = self.ask("facts")
        except BaseException:
            self.close()
            raise
        self.process_s = perf_counter() - begin_s

    def ask(self, do: str, /, **fields: Any) -> dict[str, Any]:
        """The answer to one request; raises the error of the process, and EngineError if the process has died."""
        self.send({"do": do, **fields})
        answer = next(self.answers(), None)
        if answer is None:
            raise EngineError(self._death())
        if "error" in answer:
            raise error_of(answer["error"])
        result: dict[str, Any] = answer["result"]
        return result

    def _death(self) -> str:
        code, last = self.death()
        how = f"was ended by signal {-code}, perhaps because memory ran out" if code < 0 else f"ended with code {code}"
        return f"the process {self._module} {how}{f': {last}' if last else ''}; use a smaller --batch"
