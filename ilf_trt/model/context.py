"""The context: what the pictures of a batch ask for, without the time, as the blocks read it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ilf_trt.contract.spec import ModelSpec
from ilf_trt.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Context:
    """Tensors of R rows by name: `shared` ones for all blocks, and (R, K, …) ones of which each of K blocks has one.

    The adapter that fills a context decides on the names.
    """

    shared: Mapping[str, Tensor]
    per_block: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def from_ports(cls, ports: Mapping[str, Tensor], spec: ModelSpec, graph: str) -> "Context":
        """What of the context crosses into `graph`, which holds blocks."""
        shared = {port.name: ports[port.name] for port in spec.context if port.name in ports}
        names = {port.name: f"{port.name}_{graph}" for port in spec.per_block}
        return cls(shared, {name: ports[port] for name, port in names.items() if port in ports})

    def at(self, index: int) -> "Context":
        """The context of block `index` of the K."""
        if not self.per_block:
            return self
        return Context(self.shared, {name: value[:, index : index + 1] for name, value in self.per_block.items()})

    def get(self, name: str) -> Tensor | None:
        """A shared tensor, if the batch has it."""
        return self.shared.get(name)

    def __getitem__(self, name: str) -> Tensor:
        """A shared tensor; raises InvalidRequest without it."""
        tensor = self.shared.get(name)
        if tensor is None:
            raise InvalidRequest(f"{name} is missing; pass every condition that the model takes")
        return tensor
