"""Folders of pictures."""

from pathlib import Path

import pytest

from ilf_trt.errors import BrokenSample, DataError, InvalidRequest
from ilf_trt.train.data.images import ImageFolder
from ilf_trt.train.data.sample import Condition
from tests.ilf_trt.train.data.conftest import encoded, write_captions, write_classes


def test_class_folders_sorted_by_name_are_the_labels(tmp_path: Path) -> None:
    source = ImageFolder(write_classes(tmp_path / "a", {"dog": 1, "cat": 2, "empty": 0}), size=8)
    samples = [source.read(index) for index in range(len(source))]
    assert [(s.key, s.label) for s in samples] == [("cat/0.png", 0), ("cat/1.png", 0), ("dog/0.png", 1)]
    assert (source.condition, source.classes, source.shape) == (Condition.LABEL, 3, (3, 8, 8))


@pytest.mark.parametrize("parts", [("train", "test"), ("Train", "val", "test"), ("validation",)])
def test_the_parts_of_a_data_set_are_no_classes(parts: tuple[str, ...], tmp_path: Path) -> None:
    write_classes(tmp_path, dict.fromkeys(parts, 1))
    with pytest.raises(InvalidRequest, match="parts of a data set and no classes; give one of them, such as"):
        ImageFolder(tmp_path, size=8)


def test_a_class_may_have_the_name_of_a_part(tmp_path: Path) -> None:
    assert ImageFolder(write_classes(tmp_path, {"train": 1, "bus": 1}), size=8).classes == 2


def test_hidden_and_other_files_are_passed_over_and_deeper_folders_read(tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "a", {"cat": 1, ".git": 1})
    (folder / "cat" / "notes.txt").write_text("")
    (folder / "cat" / ".hidden.png").write_bytes(encoded(0))
    (folder / "cat" / "more").mkdir()
    (folder / "cat" / "more" / "2.JPEG").write_bytes(encoded(0, 8, "JPEG"))
    assert ImageFolder(folder, size=8).names == ["cat/0.png", "cat/more/2.JPEG"]


def test_metadata_gives_captions(tmp_path: Path) -> None:
    source = ImageFolder(write_captions(tmp_path / "a", 2), size=4)
    sample = source.read(1)
    assert (sample.key, sample.caption, sample.label, sample.size) == ("1.png", "Picture number 1", None, (4, 4))
    assert (source.condition, source.classes) == (Condition.CAPTION, None)


def test_metadata_gives_labels(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "label": 4}\n\n{"file_name": "b.png", "label": 1}')
    (tmp_path / "a.png").write_bytes(encoded(0))
    source = ImageFolder(tmp_path, size=8)
    assert (source.read(0).label, source.classes, len(source)) == (4, 5, 2)
    with pytest.raises(BrokenSample, match=r"b\.png: No such file"):
        source.read(1)


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("{", "line 2 is not readable JSON"),
        ("3", "line 2 holds int"),
        ("{}", "line 2 has no file_name"),
        ('{"file_name": "a.png"}', "line 2 has neither text nor label"),
        ('{"file_name": "a.png", "text": "a", "label": 1}', "line 2 has label and text"),
        ('{"file_name": "a.png", "label": "1"}', "line 2: label is '1'"),
        ('{"file_name": "a.png", "label": -1}', "line 2: label is -1"),
        ('{"file_name": "a.png", "text": 1}', "line 2: text is 1"),
        ('{"file_name": "a.png", "text": "a"}', "text in some lines and label in others"),
        (b"\xff", "is not UTF-8"),
    ],
)
def test_a_line_that_cannot_be_understood_is_named(line: str | bytes, part: str, tmp_path: Path) -> None:
    first = b'{"file_name": "a.png", "label": 0}\n'
    (tmp_path / "metadata.jsonl").write_bytes(first + (line if isinstance(line, bytes) else line.encode()))
    with pytest.raises(DataError, match=part):
        ImageFolder(tmp_path, size=8)


@pytest.mark.parametrize("name", ["missing", "."])
def test_a_folder_without_pictures_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"metadata\.jsonl with a line such as"):
        ImageFolder(tmp_path / name, size=8)
