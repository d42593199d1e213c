"""Classes by their names: a model's id2label read into names, and asked names and numbers into class numbers."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from ilf_trt.errors import InvalidRequest

SUGGESTIONS = 3


def names_of(id2label: Mapping[str, str]) -> dict[str, int]:
    """`{"207": "golden retriever, goldie"}` -> every synonym with its class number, in the order of the alphabet.

    As `labels` of diffusers' DiTPipeline: of two classes of one name the later counts. Raises InvalidRequest for a key
    that is no number.
    """
    names: dict[str, int] = {}
    for key, label in id2label.items():
        try:
            number = int(key)
        except ValueError as error:
            raise InvalidRequest(f"id2label has the key {key!r}, which is no class number; give 0, 1, 2 …") from error
        names.update({name.strip(): number for name in label.split(",")})
    return dict(sorted(names.items()))


def labels_of(asked: Sequence[int | str], names: Mapping[str, int], count: int | None) -> list[int]:
    """The class number of each number or name in `asked`; `names` as `names_of` gives them.

    Numbers must be in 0 .. count - 1, in any not negative where `count` is None. Names match in either case; one that
    names two classes by its capitals (ImageNet's Cardigan is a dog, cardigan a garment) must be written exactly. Raises
    InvalidRequest, which names the closest names.
    """
    if isinstance(asked, str):
        raise InvalidRequest(f"classes is the text {asked!r}; give a list of names or numbers")
    folded: dict[str, set[str]] = {}
    for name in names:
        folded.setdefault(name.casefold(), set()).add(name)
    return [_number(one, names, folded) if isinstance(one, str) else _check_number(one, count) for one in asked]


def _number(asked: str, names: Mapping[str, int], folded: Mapping[str, set[str]]) -> int:
    name = asked.strip()
    if name in names:
        return names[name]
    spellings = sorted(folded.get(name.casefold(), ()))
    if not spellings:
        raise InvalidRequest(f"{asked!r} is no class; {_advice(name, folded)}")
    numbers = {names[spelling] for spelling in spellings}
    if len(numbers) > 1:
        meant = " or ".join(f"{spelling!r} ({names[spelling]})" for spelling in spellings)
        raise InvalidRequest(f"{asked!r} is more than one class; write {meant}")
    return numbers.pop()


def _advice(name: str, folded: Mapping[str, set[str]]) -> str:
    if not folded:
        return "this model has no names of classes, give their numbers"
    close = [repr(min(folded[match])) for match in get_close_matches(name.casefold(), folded, SUGGESTIONS)]
    if not close:
        return "no name is close to it, give a number of a class"
    return f"did you mean {' or '.join(close)}?"


def _check_number(number: int, count: int | None) -> int:
    # A bool is an int to Python, and as a class it is a mistake.
    if not isinstance(number, int) or isinstance(number, bool):
        raise InvalidRequest(f"{number!r} is no class; give its name, or its number as an int")
    if number < 0 or (count is not None and number >= count):
        raise InvalidRequest(
            f"class {number} does not exist; give {'0 or more' if count is None else f'0 to {count - 1}'}"
        )
    return number
