"""Conditioning: what a caller gives for each picture, made by the backbone's adapter, without torch.

A class label, or embedded text with its mask and the size of the picture. Everything outside a backbone asks here what
a condition is; nothing else knows one kind of model from another.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilf_trt.errors import InvalidRequest

from .arrays import as_array
from .ports import PICTURES, Port, Role

NEGATIVE = "negative_"
MASK = "_mask"
BRANCHED = (Role.TEXT, Role.MASK)
"""A guided picture has these twice: what it shall show, and what it shall not."""

RESERVED = frozenset(
    (
        "binning",
        "cancel",
        "clean_captions",
        "decode",
        "guidance_scale",
        "latents",
        "manifest",
        "negative_prompt",
        "noise",
        "on_device",
        "plan",
        "profile",
        "progress",
        "prompt",
        "seed",
        "self",
        "size",
        "steps",
        "timeout",
    )
)
"""Arguments of a request: no condition has one of these names, since both are passed by name."""

Normal = Callable[[tuple[int, ...]], NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Conditioning:
    """The ports of B pictures, without the negative ones; `null` is the class that asks for nothing.

    Legend: B pictures, L text tokens, C channels of embedded text. Raises InvalidRequest for a name in `RESERVED`.
    """

    positive: tuple[Port, ...]
    null: int | None

    def __post_init__(self) -> None:
        for port in self.ports(guidance=True):
            if port.name in RESERVED:
                raise InvalidRequest(f"a condition is named {port.name!r}, as an argument of `generate`; rename it")

    @classmethod
    def of_labels(cls, classes: int) -> "Conditioning":
        """A class label a picture; the null class follows the last class."""
        return cls((Port("class_labels", (PICTURES,), "int32", Role.LABEL, below=classes + 1),), classes)

    @classmethod
    def of_text(cls, tokens: int, channels: int, *, sized: bool) -> "Conditioning":
        """Embedded text (B, L, C) and its mask; `sized` adds the resolution (B, 2) and the aspect ratio (B, 1)."""
        text = (
            Port("text", (PICTURES, tokens, channels), "float32", Role.TEXT),
            Port(f"text{MASK}", (PICTURES, tokens), "float32", Role.MASK),
        )
        sizes = (
            Port("resolution", (PICTURES, 2), "float32", Role.RESOLUTION),
            Port("aspect_ratio", (PICTURES, 1), "float32", Role.ASPECT_RATIO),
        )
        return cls((*text, *(sizes if sized else ())), None)

    def port(self, role: Role) -> Port | None:
        """The port of a role, if the model has one."""
        return next((port for port in self.positive if port.role is role), None)

    @property
    def classes(self) -> int | None:
        """How many classes there are, without the null class; None for a model of text."""
        return self.null

    def ports(self, *, guidance: bool) -> tuple[Port, ...]:
        """What a caller gives for each picture; with guidance also what the picture shall not show."""
        branched = tuple(port for port in self.positive if port.role in BRANCHED)
        negative = tuple(replace(port, name=f"{NEGATIVE}{port.name}") for port in branched) if guidance else ()
        return (*branched, *negative, *(port for port in self.positive if port.role not in BRANCHED))

    def row_ports(self, rows: str) -> tuple[Port, ...]:
        """What the graphs take: a row for each picture, and a second row for each guided picture."""
        return tuple(replace(port, shape=(rows, *port.shape[1:])) for port in self.positive)

    def example(
        self, pictures: int, size: tuple[int, int], *, guidance: bool, normal: Normal = np.zeros
    ) -> dict[str, NDArray[Any]]:
        """Conditions of `pictures` pictures of `size` (height, width) pixels: classes in order, text from `normal`.

        Half of each text's tokens count.
        """
        height, width = size
        arrays: dict[str, NDArray[Any]] = {}
        for port in self.ports(guidance=guidance):
            shape = port.resolve({PICTURES: pictures})
            if port.role is Role.LABEL:
                arrays[port.name] = np.arange(pictures) % (port.below or 1)
            elif port.role is Role.MASK:
                arrays[port.name] = np.tile(np.arange(shape[1]) < max(shape[1] // 2, 1), (pictures, 1))
            elif port.role is Role.RESOLUTION:
                arrays[port.name] = np.tile([height, width], (pictures, 1))
            elif port.role is Role.ASPECT_RATIO:
                arrays[port.name] = np.tile([height / width], (pictures, 1))
            else:
                arrays[port.name] = normal(shape)
            arrays[port.name] = arrays[port.name].astype(port.dtype)
        return arrays

    def from_sample(
        self, *, size: tuple[int, int], label: int | None = None, text: Any = None, mask: Any = None
    ) -> dict[str, Any]:
        """The conditions of one training sample by port; `size` is (height, width) in pixels.

        Raises InvalidRequest when the sample lacks what the model takes.
        """
        values: dict[Role, Any] = {
            Role.LABEL: label,
            Role.TEXT: text,
            Role.MASK: mask,
            Role.RESOLUTION: [float(side) for side in size],
            Role.ASPECT_RATIO: [size[0] / size[1]],
        }
        for port in self.positive:
            if values.get(port.role) is None:
                raise InvalidRequest(f"a sample has no {port.role}, the model takes {port.name}; give data that has it")
        return {port.name: values[port.role] for port in self.positive}

    def with_size(self, values: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
        """`values` and, if the model takes them and the caller left them out, the resolution and the aspect ratio.

        `size` is (height, width) in pixels.
        """
        pictures = max((len(value) for value in values.values() if hasattr(value, "__len__")), default=0)
        height, width = size
        rows = {Role.RESOLUTION: [height, width], Role.ASPECT_RATIO: [height / width]}
        sizes = {
            port.name: np.tile(np.array(rows[port.role], np.float32), (pictures, 1))
            for port in self.positive
            if port.role in rows and port.name not in values and pictures
        }
        return {**values, **sizes}

    def validate(self, values: Mapping[str, Any], *, guidance: bool) -> tuple[dict[str, NDArray[Any]], int]:
        """Each port's array in its dtype and shape, text padded under its mask; and the number of pictures B.

        A text without a mask counts whole. Raises InvalidRequest.
        """
        ports = {port.name: port for port in self.ports(guidance=guidance)}
        unknown = sorted(values.keys() - ports.keys())
        if unknown:
            raise InvalidRequest(f"{unknown[0]!r} is not a condition of this bundle; it takes {', '.join(ports)}")
        values = _with_masks(ports, values)
        missing = sorted(ports.keys() - values.keys())
        if missing:
            raise InvalidRequest(f"{missing[0]!r} is missing; this bundle takes {', '.join(ports)}")
        arrays = {name: _validate_port(port, values[name]) for name, port in ports.items()}
        counts = {name: len(array) for name, array in arrays.items()}
        pictures = max(counts.values())
        for name, count in counts.items():
            if count != pictures:
                raise InvalidRequest(
                    f"{name!r} is for {count} pictures, another condition for {pictures}; give the same"
                )
        return arrays, pictures

    def rows(
        self,
        values: Mapping[str, Any],
        *,
        guided: bool,
        join: Callable[[Sequence[Any]], Any] = np.concatenate,
    ) -> dict[str, Any]:
        """Conditions of B pictures -> those of the R rows that the graphs see, under the same names.

        A guided batch has the conditional rows first, then as many unconditional ones: the null class, or what
        `negative_…` says, or the same. `join` concatenates arrays; pass `torch.cat` for tensors.
        """
        rows = {}
        for port in self.positive:
            own = values[port.name]
            if guided:
                null = port.role is Role.LABEL and self.null is not None
                other = own * 0 + self.null if null else values.get(f"{NEGATIVE}{port.name}", own)
                own = join([own, other])
            rows[port.name] = own
        return rows


def negative(values: Mapping[str, Any]) -> dict[str, Any]:
    """Conditions under the names of the negative ports."""
    return {f"{NEGATIVE}{name}": value for name, value in values.items()}


def _with_masks(ports: Mapping[str, Port], values: Mapping[str, Any]) -> dict[str, Any]:
    values = dict(values)
    texts = [name for name, port in ports.items() if port.role is Role.TEXT]
    masks = [name for name, port in ports.items() if port.role is Role.MASK]
    if len(texts) != len(masks):
        return values
    for name, mask_name in zip(texts, masks, strict=True):
        if name not in values:
            continue
        text = values[name] = as_array(name, values[name])
        mask = as_array(mask_name, values.get(mask_name, np.ones(text.shape[:2], np.float32)))
        if text.shape[1:2] != mask.shape[1:2]:
            raise InvalidRequest(f"{mask_name} is {mask.shape}, its text is {text.shape}; give a number for each token")
        values[mask_name] = mask
    return values


def _validate_port(port: Port, value: Any) -> NDArray[Any]:
    """`value` in the port's dtype and shape, text padded to its length under a zero mask; raises InvalidRequest."""
    array = as_array(port.name, value)
    whole = port.dtype.startswith("int")
    if array.dtype.kind not in ("iu" if whole else "f"):
        raise InvalidRequest(f"{port.name} is {array.dtype}, expected {'whole numbers' if whole else 'floating point'}")
    if array.ndim != len(port.shape) or array.shape[0] < 1:
        raise InvalidRequest(f"{port.name} has shape {array.shape}, expected {port.shape}, B >= 1")
    if port.role in BRANCHED and array.shape[1] < int(port.shape[1]):
        padding = [(0, 0)] * array.ndim
        padding[1] = (0, int(port.shape[1]) - array.shape[1])
        array = np.pad(array, padding)
    if array.shape[1:] != port.shape[1:]:
        raise InvalidRequest(f"{port.name} has shape {array.shape}, expected {port.shape}")
    if port.below is not None and (array.min() < 0 or array.max() >= port.below):
        wrong = next(int(v) for v in array.flat if not 0 <= v < port.below)
        raise InvalidRequest(f"{port.name} holds {wrong}, expected 0 to {port.below - 1}")
    if not whole and not (np.abs(array) <= np.finfo(port.dtype).max).all():
        raise InvalidRequest(f"{port.name} holds NaN or infinity")
    return array.astype(port.dtype)
