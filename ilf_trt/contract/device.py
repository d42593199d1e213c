"""What runs a model, as people write it: `cpu`, `cuda` or `cuda:N`."""

from ilf_trt.errors import InvalidRequest, told

from .arrays import is_digits


def ordinal_of(device: str) -> int | None:
    """`"cuda:1"` -> 1, `"cuda"` -> 0, `"cpu"` -> None; raises InvalidRequest."""
    name, colon, number = device.partition(":")
    if device == "cpu":
        return None
    if name != "cuda" or (colon and not is_digits(number)):
        raise InvalidRequest(f"device {told(device)} is unknown; it is cpu, cuda or cuda:N")
    return int(number or 0)
