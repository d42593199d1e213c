"""Names of classes as DiTPipeline has them, and what is asked as class numbers."""

import re
from typing import Any

import pytest
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

from ilf_trt.contract.class_names import labels_of, names_of
from ilf_trt.errors import InvalidRequest

ID2LABEL = {
    "0": "tench, Tinca tinca",
    "2": "great white shark, white shark, man-eater, man-eating shark, Carcharodon carcharias",
    "134": "crane",
    "207": "golden retriever",
    "208": "Labrador retriever",
    "264": "Cardigan, Cardigan Welsh corgi",
    "474": "cardigan",
    "517": "crane",
    "879": " umbrella ,  ",
}
NAMES = names_of(ID2LABEL)


def test_names_are_those_of_diffusers_in_its_order() -> None:
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=1)
    pipeline = DiTPipeline(None, vae, DDIMScheduler(), id2label={int(key): label for key, label in ID2LABEL.items()})
    assert list(NAMES.items()) == list(pipeline.labels.items())
    asked = ["white shark", "umbrella", "crane", "Cardigan"]
    assert labels_of(asked, NAMES, 1000) == pipeline.get_label_ids(asked)


def test_every_synonym_is_a_name() -> None:
    assert labels_of(["tench", "Tinca tinca"], NAMES, 1000) == [0, 0]


def test_of_two_classes_of_one_name_the_later_counts() -> None:
    assert NAMES["crane"] == 517


def test_numbers_and_names_may_be_mixed_and_come_back_in_order() -> None:
    assert labels_of([3, "crane", 0, "tench"], NAMES, 1000) == [3, 517, 0, 0]
    assert labels_of([], NAMES, 1000) == []


@pytest.mark.parametrize("asked", ["Golden Retriever", "GOLDEN RETRIEVER", "  golden retriever "])
def test_a_name_matches_in_either_case(asked: str) -> None:
    assert labels_of([asked], NAMES, 1000) == [207]


def test_a_name_told_apart_by_its_capitals_must_be_written_exactly() -> None:
    assert labels_of(["Cardigan", "cardigan"], NAMES, 1000) == [264, 474]
    with pytest.raises(InvalidRequest, match=r"'CARDIGAN' is more than one class; write 'Cardigan' \(264\) or 'card"):
        labels_of(["CARDIGAN"], NAMES, 1000)


def test_two_spellings_of_one_class_are_no_riddle() -> None:
    assert labels_of(["CAT"], {"Cat": 3, "cat": 3}, None) == [3]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("great white sharks", "'great white sharks' is no class; did you mean 'great white shark' or 'white shark'?"),
        ("golden retreiver", "'golden retreiver' is no class; did you mean 'golden retriever' or"),
        ("tencha", "'tencha' is no class; did you mean 'tench'?"),
        ("LABRADOR RETREIVER", "'LABRADOR RETREIVER' is no class; did you mean 'Labrador retriever'"),
        ("shark", "'shark' is no class; did you mean 'white shark'"),
        ("zzzz", "'zzzz' is no class; no name is close to it, give a number of a class"),
        ("207", "'207' is no class"),
        ("", "'' is no class"),
    ],
)
def test_an_unknown_name_is_refused_with_the_closest(asked: str, message: str) -> None:
    names = names_of({key: label for key, label in ID2LABEL.items() if key != "879"})
    with pytest.raises(InvalidRequest, match=re.escape(message)):
        labels_of([asked], names, 1000)


def test_of_many_close_names_three_are_told() -> None:
    with pytest.raises(InvalidRequest, match=r"did you mean 'cat.'( or 'cat.'){2}\?"):
        labels_of(["cat"], {f"cat{letter}": number for number, letter in enumerate("abcdef")}, None)


def test_a_name_for_a_model_without_names_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="'crane' is no class; this model has no names of classes"):
        labels_of(["crane"], {}, 10)


@pytest.mark.parametrize(("number", "count"), [(-1, 10), (10, 10), (-1, None), (1000, 1000)])
def test_a_number_outside_of_the_classes_is_refused(number: int, count: int | None) -> None:
    with pytest.raises(InvalidRequest, match=f"class {number} does not exist; give 0 "):
        labels_of([number], NAMES, count)


@pytest.mark.parametrize(("number", "count"), [(0, 10), (9, 10), (123456, None)])
def test_a_number_among_the_classes_passes(number: int, count: int | None) -> None:
    assert labels_of([number], {}, count) == [number]


@pytest.mark.parametrize("asked", [True, 1.0, None, ["crane"]], ids=repr)
def test_what_is_neither_a_name_nor_a_number_is_refused(asked: Any) -> None:
    with pytest.raises(InvalidRequest, match="is no class; give its name, or its number as an int"):
        labels_of([asked], NAMES, 1000)


def test_one_name_in_place_of_a_list_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="give a list of names or numbers"):
        labels_of("crane", NAMES, 1000)


def test_a_key_that_is_no_number_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="id2label has the key 'crane'"):
        names_of({"crane": "134"})
