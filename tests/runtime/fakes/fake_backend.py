"""A backend whose sessions compute in microseconds, and notice every use that a real one would not survive."""

import time
from collections.abc import Mapping
from threading import Lock, get_ident
from typing import Any

import numpy as np

from ilf_trt.contract.ports import Graph
from ilf_trt.runtime.session import Session
from ilf_trt.runtime.timings import Timings
from ilf_trt.runtime.trajectory import Job, RunOptions


class FakeBackend:
    """Latents are twice the noise. `faults` says what went wrong: two threads in a session, or use after the end."""

    on_gpu, description, max_sessions = False, "fake", None
    device_name, library = "fake", "fake 1.0"

    def __init__(self, step_s: float = 0.0) -> None:
        self.step_s = step_s
        self.faults: list[str] = []
        self.owners: list[FakeOwner] = []
        self.closed = self.running = self.most = 0
        self.lock = Lock()

    def session(self, max_trajectories: int = 4) -> Session:
        owner = FakeOwner(self)
        self.owners.append(owner)
        return Session(owner.bind, owner.bind_call, owner.release, max_trajectories=max_trajectories)

    def close(self) -> None:
        self.closed += 1
        self.faults += ["the backend closed before a session"] * any(not owner.released for owner in self.owners)


class FakeOwner:
    """What belongs to one session."""

    def __init__(self, backend: FakeBackend) -> None:
        self.backend = backend
        self.inside: int | None = None
        self.released = self.runs = self.binds = 0

    def bind(self, job: Job) -> "FakeTrajectory":
        self.binds += 1
        return FakeTrajectory(self, job)

    def bind_call(self, graph: Graph, sizes: Mapping[str, int]) -> "FakeCall":
        return FakeCall(self, graph, sizes)

    def release(self) -> None:
        self.released += 1
        self.backend.faults += ["a session closed while it ran"] * (self.inside is not None)

    def __enter__(self) -> None:
        backend = self.backend
        backend.faults += ["two threads in a session"] * (self.inside is not None)
        backend.faults += ["a closed session ran"] * bool(self.released or backend.closed)
        self.inside = get_ident()
        with backend.lock:
            backend.running += 1
            backend.most = max(backend.most, backend.running)

    def __exit__(self, *error: object) -> None:
        self.inside = None
        with self.backend.lock:
            self.backend.running -= 1
        self.runs += 1


class FakeTrajectory:
    def __init__(self, owner: FakeOwner, job: Job) -> None:
        self.owner, self.job = owner, job

    def run(self, noise: Any, conditions: Any, guidance_scale: float, options: RunOptions) -> tuple[Any, Timings]:
        with self.owner:
            for _ in self.job.plan.steps:
                if self.owner.backend.step_s:
                    time.sleep(self.owner.backend.step_s)
                if options.watch is not None:
                    options.watch()
            return 2 * noise, Timings(1.0, {}, (), len(self.job.plan.steps))

    def close(self) -> None:
        self.owner.backend.faults += ["a trajectory closed while it ran"] * (self.owner.inside is not None)


class FakeCall:
    def __init__(self, owner: FakeOwner, graph: Graph, sizes: Mapping[str, int]) -> None:
        self.owner = owner
        self.inputs, self.outputs = (
            {port.name: np.zeros(port.resolve(sizes), port.array_dtype) for port in ports}
            for ports in (graph.inputs, graph.outputs)
        )

    def __call__(self) -> None:
        with self.owner:
            pass

    def close(self) -> None:
        pass
