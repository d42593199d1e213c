"""The bundle: what opens, what is refused and why, and builds that fail or are killed at any moment."""

import errno
import json
import os
import pkgutil
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ilf_trt.assembly.staging import staging_folder
from ilf_trt.contract.bundle import CONSTANTS_FILE, ENGINE_FOLDER, MANIFEST_FILE, Bundle, strip_graphs, write_manifest
from ilf_trt.contract.graphs import graphs_of
from ilf_trt.contract.manifest import SCHEMA, AttentionAmax, Calibration, EngineFacts, Manifest
from ilf_trt.contract.ports import GRAPHS
from ilf_trt.contract.spec import Calibrator, Precision
from ilf_trt.contract.stamp import DIGEST, stamped
from ilf_trt.errors import BundleError, IlfError, InvalidRequest, MissingDependency
from tests.conftest import small_dit, write_checkpoint
from tests.manifests import change_manifest

Change = Callable[[dict[str, Any]], object]

START_S = 120.0  # until a child process has begun its work, on a busy machine
POLL_S = 0.02

# Enters `drafted`, says so, and sleeps until it is killed.
SLEEPER = """
import sys, time
from ilf_trt.assembly.staging import staging_folder
with staging_folder(sys.argv[1], force=True) as draft:
    (draft / "manifest.json").write_text("half")
    print(draft, flush=True)
    time.sleep(600)
"""
# Replaces a bundle, and dies by SIGKILL just before the n-th event of a name.
DIES_BEFORE = """
import os, signal, sys
from ilf_trt.assembly.staging import staging_folder
output, wanted, left = sys.argv[1], sys.argv[2], int(sys.argv[3])
def hook(event, arguments):
    global left
    if event == wanted:
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
with staging_folder(output, force=True) as draft:
    (draft / "manifest.json").write_text("new")
    sys.addaudithook(hook)
"""


@pytest.fixture
def copy(dit_bundle: Path, tmp_path: Path) -> Path:
    """A bundle to damage."""
    return Path(shutil.copytree(dit_bundle, tmp_path / "copy.ilf"))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty folder whose whole content a test may list."""
    folder = tmp_path / "place"
    folder.mkdir()
    return folder


def stand_in(path: Path, text: str = "old") -> Path:
    """What counts as a bundle when one is replaced: a folder with a manifest."""
    path.mkdir(parents=True)
    (path / MANIFEST_FILE).write_text(text)
    (path / "graph").write_text(text)
    return path


def fill(draft: Path, text: str = "new") -> None:
    (draft / MANIFEST_FILE).write_text(text)
    (draft / "graph").write_text(text)


def build(output: Path, body: Callable[[Path], object], *, force: bool = False) -> None:
    with staging_folder(output, force=force) as draft:
        body(draft)


def fail(draft: Path) -> None:
    raise RuntimeError("in the middle")


def never(draft: Path) -> None:
    pytest.fail("the block must not run")


def content(path: Path) -> list[str]:
    return [file.read_text() for file in sorted(path.iterdir())]


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refuse(bundle: Path, message: str, **options: Any) -> None:
    with pytest.raises(BundleError, match=message):
        Bundle.open(bundle, **options)


# --- a whole bundle


@pytest.mark.parametrize("kind", [str, Path])
def test_a_whole_bundle_opens(kind: type, dit_bundle: Path) -> None:
    bundle = Bundle.open(kind(dit_bundle))
    assert tuple(graph.name for graph in bundle.manifest.graphs) == GRAPHS
    assert all(bundle.graph(name).path.is_file() for name in GRAPHS)


def test_a_copied_and_renamed_bundle_opens(copy: Path) -> None:
    assert Bundle.open(copy.rename(copy.parent / "elsewhere")).manifest.spec.kind == "dit"


def test_a_link_to_a_bundle_opens(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(copy)
    assert Bundle.open(tmp_path / "link").manifest == Bundle.open(copy).manifest


@pytest.mark.parametrize("which", ["dit_bundle", "pixart_bundle"])
def test_a_manifest_comes_back_from_json_unchanged(which: str, request: pytest.FixtureRequest) -> None:
    manifest = Bundle.open(request.getfixturevalue(which)).manifest
    assert Manifest.from_json(json.loads(json.dumps(manifest.as_json()))) == manifest


def test_the_manifest_lists_every_file_with_its_size(dit_bundle: Path) -> None:
    bundle = Bundle.open(dit_bundle)
    found = {path.relative_to(dit_bundle).as_posix(): path for path in dit_bundle.rglob("*") if path.is_file()}
    assert found.keys() - bundle.manifest.files.keys() == {MANIFEST_FILE}
    assert bundle.manifest.files.keys() <= found.keys()
    assert bundle.size_bytes == sum(path.stat().st_size for name, path in found.items() if name != MANIFEST_FILE)


def test_a_bundle_holds_no_path_of_the_machine_that_built_it(dit_bundle: Path, dit_checkpoint: Path) -> None:
    for path in dit_bundle.rglob("*"):
        assert path.is_dir() or str(dit_checkpoint.parent).encode() not in path.read_bytes(), path


def test_a_bundle_holds_no_pickle(dit_bundle: Path) -> None:
    assert {path.suffix for path in dit_bundle.rglob("*") if path.is_file()} <= {".onnx", ".data", ".json", ".npz"}


def test_the_manifest_of_a_changed_folder_is_its_own(copy: Path) -> None:
    (copy / "graphs" / "deep").mkdir()
    manifest = Bundle.open(copy).manifest
    (copy / "graphs" / "deep" / "note").write_text("added")
    written = write_manifest(copy, manifest)
    assert written.files["graphs/deep/note"].size_bytes == 5
    assert Bundle.open(copy).manifest == written


# --- files that are not what the manifest says


def test_a_flipped_bit_in_any_file_is_refused_by_name(copy: Path) -> None:
    for name in Bundle.open(copy).manifest.files:
        path = copy / name
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        refuse(copy, f"{path} has sha256 .* the manifest says")
        path.write_bytes(good)
    Bundle.open(copy)


def test_without_hashes_a_flipped_bit_passes_and_a_lost_byte_does_not(copy: Path) -> None:
    path = copy / "graphs" / "pre.onnx"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    Bundle.open(copy, check_hashes=False)
    path.write_bytes(good[:-1])
    refuse(copy, r"pre\.onnx has .* bytes", check_hashes=False)


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\0", lambda data: b""])
def test_a_file_of_another_size_is_refused(change: Callable[[bytes], bytes], copy: Path) -> None:
    path = copy / "graphs" / "post.onnx"
    size = path.stat().st_size
    path.write_bytes(change(path.read_bytes()))
    refuse(copy, rf"post\.onnx has {path.stat().st_size} bytes, the manifest says {size}; copy the bundle again")


def test_any_missing_file_is_refused_by_name(copy: Path) -> None:
    for name in Bundle.open(copy).manifest.files:
        path = copy / name
        aside = path.rename(copy.parent / "aside")
        refuse(copy, f"{path} is missing", check_hashes=False)
        aside.rename(path)
    Bundle.open(copy)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_what_is_no_file_is_refused(make: Callable[[Path], None], copy: Path) -> None:
    (copy / "reference.npz").unlink()
    make(copy / "reference.npz")
    refuse(copy, r"reference\.npz cannot be read \(not a regular file\)")


@pytest.mark.parametrize("name", ["notes.txt", "graphs/notes.txt", "graphs/deep/README.md"])
def test_a_file_that_is_not_in_the_manifest_is_refused(name: str, copy: Path) -> None:
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text("mine")
    refuse(copy, f"{name} is not in the manifest", check_hashes=False)


@pytest.mark.parametrize("name", [".gitattributes", "README.md", "LICENSE", ".hidden/anything"])
def test_what_a_hub_adds_to_a_folder_does_not_matter(name: str, copy: Path) -> None:
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text("mine")
    Bundle.open(copy)
    assert write_manifest(copy, Bundle.open(copy).manifest) == Bundle.open(copy).manifest


@pytest.mark.parametrize("name", ["../outside", "graphs/../../outside", "..\\outside", "..", "graphs\\pre.onnx"])
def test_a_name_that_could_leave_the_bundle_is_refused(name: str, copy: Path) -> None:
    (copy.parent / "outside").write_text("secret")
    change_manifest(copy, lambda data: data["files"].update({name: {"sha256": "0" * 64, "size_bytes": 6}}))
    refuse(copy, "outside the bundle; do not use this bundle")


def test_an_absolute_name_is_refused(copy: Path) -> None:
    outside = copy.parent / "outside"
    outside.write_text("secret")
    change_manifest(copy, lambda data: data["files"].update({str(outside): {"sha256": "0" * 64, "size_bytes": 6}}))
    refuse(copy, "outside the bundle; do not use this bundle")


@pytest.mark.parametrize("name", ["graphs/pre.onnx", "graphs"], ids=["a file", "a folder"])
def test_a_link_that_leaves_the_bundle_is_refused(name: str, copy: Path) -> None:
    outside = (copy / name).rename(copy.parent / "outside")
    (copy / name).symlink_to(outside)
    refuse(copy, "is a link that leaves the bundle", check_hashes=False)


@pytest.mark.parametrize("name", ["graphs/pre.onnx", "graphs"], ids=["a file", "a folder"])
def test_a_link_that_leaves_the_bundle_opens_where_its_hash_fits(name: str, copy: Path) -> None:
    outside = (copy / name).rename(copy.parent / "outside")
    (copy / name).symlink_to(outside)
    Bundle.open(copy)
    (outside / "pre.onnx" if outside.is_dir() else outside).write_bytes(b"")
    refuse(copy, "pre.onnx has 0 bytes")


@pytest.mark.parametrize("name", ["", ".", "graphs", "\0", "x" * 300, "a//b"])
def test_a_name_that_is_no_file_is_refused(name: str, copy: Path) -> None:
    change_manifest(copy, lambda data: data["files"].update({name: {"sha256": "0" * 64, "size_bytes": 6}}))
    refuse(copy, "cannot be read|manifest")


# --- manifests


@pytest.mark.parametrize("name", ["nothing", "file"])
def test_a_path_that_is_no_folder_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refuse(tmp_path / name, "is not a bundle: no such folder; make one with ilf-trt build")


def test_a_half_written_bundle_is_refused(copy: Path) -> None:
    (copy / MANIFEST_FILE).unlink()
    refuse(copy, r"holds no manifest\.json: half-written or not a bundle")


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"\x00", b"{'schema': 1}"], ids=repr)
def test_a_manifest_that_is_not_json_is_refused(text: bytes, copy: Path) -> None:
    (copy / MANIFEST_FILE).write_bytes(text)
    refuse(copy, r"manifest\.json is not (readable JSON|UTF-8)")


def test_a_truncated_manifest_is_refused(copy: Path) -> None:
    path = copy / MANIFEST_FILE
    path.write_text(path.read_text()[:-20])
    refuse(copy, r"manifest\.json is not readable JSON")


def test_a_manifest_nested_without_end_is_refused(copy: Path) -> None:
    (copy / MANIFEST_FILE).write_text("[" * 100_000)
    refuse(copy, r"manifest\.json")


@pytest.mark.parametrize("text", ["[]", "1", "null", '"manifest"'])
def test_a_manifest_that_is_no_object_is_refused(text: str, copy: Path) -> None:
    (copy / MANIFEST_FILE).write_text(text)
    refuse(copy, r"manifest\.json holds .*, expected an object")


@pytest.mark.parametrize("schema", [SCHEMA + 1, 99])
def test_a_newer_schema_asks_for_an_upgrade(schema: int, copy: Path) -> None:
    change_manifest(copy, lambda data: data.update(schema=schema))
    refuse(copy, f"manifest schema is {schema}, this version reads {SCHEMA}; upgrade ilf-trt")


@pytest.mark.parametrize("schema", [SCHEMA - 1, 0, -1, None, str(SCHEMA), [SCHEMA], {}])
def test_an_older_or_strange_schema_asks_for_a_build(schema: object, copy: Path) -> None:
    change_manifest(copy, lambda data: data.update(schema=schema))
    refuse(copy, f"manifest schema is .*, this version reads {SCHEMA}; build the bundle again")


def test_any_missing_field_is_refused_by_name(dit_bundle: Path) -> None:
    data = json.loads((dit_bundle / MANIFEST_FILE).read_text())
    for name in data.keys() - {"schema", DIGEST}:
        with pytest.raises(BundleError, match=f"manifest.*field.*{name}|manifest: step plan"):
            Manifest.from_json(stamped({key: value for key, value in data.items() if key not in (name, DIGEST)}))


@pytest.mark.parametrize("part", ["spec", "batch", "plan"])
def test_any_missing_field_of_a_part_is_refused_by_name(part: str, dit_bundle: Path) -> None:
    data = json.loads((dit_bundle / MANIFEST_FILE).read_text())
    for name in data[part].keys() - {"block_forwards"}:
        less = {key: value for key, value in data[part].items() if key != name}
        with pytest.raises(BundleError, match=f"manifest.*field missing or wrong.*{name}|manifest: step plan"):
            Manifest.from_json(stamped({**data, part: less}))


def test_a_field_that_this_version_does_not_know_is_refused(copy: Path) -> None:
    change_manifest(copy, lambda data: data["spec"].update(colour="green"))
    refuse(copy, "manifest: has an unknown field .*colour")


@pytest.mark.parametrize("field", ["spec", "precision", "batch", "graphs", "scales", "plan", "scheduler", "files"])
@pytest.mark.parametrize("value", [None, 1, "x", ["x"]], ids=repr)
def test_a_field_of_a_wrong_type_is_refused(field: str, value: object, copy: Path) -> None:
    change_manifest(copy, lambda data: data.update({field: value}))
    refuse(copy, "manifest: .*field missing or wrong|manifest: step plan")


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["files"]["graphs/pre.onnx"].update(sha256=5),
        lambda data: data["files"]["graphs/pre.onnx"].update(sha256=None),
        lambda data: data["files"]["graphs/pre.onnx"].update(size_bytes="many"),
        lambda data: data["files"].update({"graphs/pre.onnx": None}),
        lambda data: data["plan"].update(blocks=1 << 40),
        lambda data: data.update(guidance_scale=1e300),
        lambda data: data.update(scales=[1e300, 0.0]),
        lambda data: data.update(scales=[0.0]),
        lambda data: data["spec"].update(blocks="four"),
        lambda data: data["spec"].update(loop={"begin": 0, "end": 9}),
        lambda data: data["spec"].update(latent=["one", 8, 8]),
        lambda data: data["batch"].update(min=9),
        lambda data: data["plan"].update(blocks=5),
        lambda data: data["plan"].update(loop=[0, 1]),
        lambda data: data.update(graphs=[]),
        lambda data: data["graphs"].pop(),
        lambda data: data["graphs"][0].update(name="other"),
    ],
    ids=[
        "sha256 a number",
        "sha256 null",
        "size a word",
        "no facts",
        "too many blocks",
        "guidance too large",
        "scale too large",
        "a scale too few",
        "blocks a word",
        "loop out of range",
        "latent a word",
        "batch out of order",
        "plan of other blocks",
        "plan of another loop",
        "no graphs",
        "a graph too few",
        "a graph of another name",
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(change: Change, copy: Path) -> None:
    change_manifest(copy, change)
    refuse(copy, "manifest|graph|port")


def test_a_graph_without_its_file_in_the_manifest_is_refused_by_name(copy: Path) -> None:
    change_manifest(copy, lambda data: data["files"].pop("graphs/loop_body.onnx"))
    refuse(copy, "lists no file for graph 'loop_body'")


# --- constants


def rewrite_constants(copy: Path, change: Change) -> None:
    """Constants that the manifest agrees with and the ports do not."""
    bundle = Bundle.open(copy)
    arrays: dict[str, Any] = dict(bundle.constants())
    change(arrays)
    np.savez(copy / CONSTANTS_FILE, **arrays)
    write_manifest(copy, bundle.manifest)


def test_constants_are_the_arrays_of_their_ports(dit_bundle: Path) -> None:
    bundle = Bundle.open(dit_bundle)
    found = {name: (array.shape, str(array.dtype)) for name, array in bundle.constants().items()}
    assert found == {port.name: (port.shape, port.dtype) for port in bundle.manifest.spec.constants}
    assert found


WEIGHT = "feedback.norm1.linear.weight"


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: arrays.pop(WEIGHT),
        lambda arrays: arrays.update({WEIGHT: arrays[WEIGHT].astype(np.float16)}),
        lambda arrays: arrays.update({WEIGHT: arrays[WEIGHT].T}),
        lambda arrays: arrays.update({WEIGHT: arrays[WEIGHT][None]}),
    ],
    ids=["missing", "another dtype", "transposed", "another shape"],
)
def test_a_constant_that_is_not_as_its_port_is_refused_by_name(change: Change, copy: Path) -> None:
    rewrite_constants(copy, change)
    with pytest.raises(BundleError, match=rf"constants\.npz lacks {WEIGHT} as float32 .*; build the bundle again$"):
        Bundle.open(copy).constants()


def test_an_array_that_is_no_constant_is_not_handed_on(copy: Path) -> None:
    before = Bundle.open(copy).constants().keys()
    rewrite_constants(copy, lambda arrays: arrays.update(times=np.zeros(3, np.float32)))
    assert Bundle.open(copy).constants().keys() == before


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04 cut short"], ids=["empty", "junk", "cut zip"])
def test_constants_that_are_no_npz_are_refused(content: bytes, copy: Path) -> None:
    manifest = Bundle.open(copy).manifest
    (copy / CONSTANTS_FILE).write_bytes(content)
    write_manifest(copy, manifest)
    with pytest.raises(BundleError, match=r"constants\.npz cannot be read \(.*\); build the bundle again$") as caught:
        Bundle.open(copy).constants()
    assert "\n" not in str(caught.value)


def test_constants_in_a_pickle_are_refused(copy: Path) -> None:
    rewrite_constants(copy, lambda arrays: arrays.update({WEIGHT: np.array([{"a": 1}], object)}))
    with pytest.raises(BundleError, match=r"constants\.npz cannot be read"):
        Bundle.open(copy).constants()


def test_constants_that_the_manifest_does_not_list_are_refused(copy: Path) -> None:
    change_manifest(copy, lambda data: data["files"].pop(CONSTANTS_FILE))
    refuse(copy, r"lists no constants\.npz; build the bundle again$")


# --- FP8 facts and engines


def eight(manifest: Manifest) -> Manifest:
    """The manifest of the same model in FP8."""
    graphs = graphs_of(manifest.spec, Precision.FP8)
    return replace(
        manifest,
        precision=Precision.FP8,
        graphs=graphs,
        fp8=Calibration(
            Calibrator.OWN, 10, {"feedback.ff.net.2": 2.0}, {"transformer_blocks.0.attn1": AttentionAmax(1.0, 2.0, 3.0)}
        ),
    )


def compiled(bundle: Path, graphs: tuple[str, ...] = GRAPHS) -> Manifest:
    """Give a bundle a file and a report for each engine, as far as a manifest knows engines."""
    manifest = Bundle.open(bundle).manifest
    (bundle / ENGINE_FOLDER).mkdir()
    facts = []
    for graph in graphs:
        file, report = f"{ENGINE_FOLDER}/{graph}.engine", f"{ENGINE_FOLDER}/{graph}.json"
        for name in (file, report):
            (bundle / name).write_text(name)
        facts.append(EngineFacts(graph, "tensorrt", file, report, "11.4", ("sm90",), "a card", "580", False, "key"))
    return write_manifest(bundle, replace(manifest, engines=tuple(facts)))


def test_fp8_facts_come_back_from_json_unchanged(dit_bundle: Path) -> None:
    manifest = eight(Bundle.open(dit_bundle).manifest)
    assert Manifest.from_json(json.loads(json.dumps(manifest.as_json()))) == manifest


@pytest.mark.parametrize("facts", [None, {}, [], 0, "", {"calibrator": "own"}], ids=repr)
def test_a_manifest_in_fp8_without_whole_facts_is_refused(facts: object, dit_bundle: Path) -> None:
    data = json.loads(json.dumps(eight(Bundle.open(dit_bundle).manifest).as_json()))
    with pytest.raises(BundleError, match=r"manifest: .*(field|FP8)"):
        Manifest.from_json(stamped({**data, "fp8": facts}))


def test_fp8_facts_without_a_word_on_attention_have_none(dit_bundle: Path) -> None:
    data = json.loads(json.dumps(eight(Bundle.open(dit_bundle).manifest).as_json()))
    older = {name: value for name, value in data["fp8"].items() if name != "attentions"}
    facts = Manifest.from_json(stamped({**data, "fp8": older})).fp8
    assert facts == Calibration(Calibrator.OWN, 10, {"feedback.ff.net.2": 2.0})


@pytest.mark.parametrize(
    ("name", "ranges"),
    [
        ("proj_out", {"query": 1.0, "key": 1.0, "value": 1.0}),
        ("transformer_blocks.4.attn1", {"query": 1.0, "key": 1.0, "value": 1.0}),
        ("feedback.attn1", {"query": -1.0, "key": 1.0, "value": 1.0}),
        ("feedback.attn1", {"query": 1.0, "key": 1e39, "value": 1.0}),
        ("feedback.attn1", {"query": 1.0, "key": 1.0}),
        ("feedback.attn1", {"query": 1.0, "key": 1.0, "value": 1.0, "weights": 1.0}),
        ("feedback.attn1", [1.0, 1.0, 1.0]),
    ],
)
def test_ranges_of_an_attention_that_is_none_or_that_are_none_are_refused(
    name: str, ranges: object, dit_bundle: Path
) -> None:
    data = json.loads(json.dumps(eight(Bundle.open(dit_bundle).manifest).as_json()))
    with pytest.raises(BundleError, match="manifest: "):
        Manifest.from_json(stamped({**data, "fp8": {**data["fp8"], "attentions": {name: ranges}}}))


def test_a_range_hides_no_scale_of_a_linear_of_its_name(dit_bundle: Path) -> None:
    data = json.loads(json.dumps(eight(Bundle.open(dit_bundle).manifest).as_json()))
    hidden = {
        "amax": {"feedback.attn1.query": -5.0},
        "attentions": {"feedback.attn1": {"query": 1.0, "key": 1.0, "value": 1.0}},
    }
    with pytest.raises(BundleError, match=r"FP8 scale of 'feedback\.attn1\.query' is -5\.0"):
        Manifest.from_json(stamped({**data, "fp8": {**data["fp8"], **hidden}}))


def test_fp8_facts_in_another_precision_are_refused(dit_bundle: Path) -> None:
    manifest = replace(Bundle.open(dit_bundle).manifest, fp8=Calibration(Calibrator.OWN, 10, {}))
    with pytest.raises(InvalidRequest, match="the FP8 facts do not go with the precision"):
        manifest.check()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("feedback.ff.net.2", float("nan")),
        ("feedback.ff.net.2", -1.0),
        ("transformer_blocks.4.ff.net.2", 2.0),
        ("transformer_blocks.x.ff.net.2", 2.0),
        ("proj_out", 2.0),
    ],
)
def test_a_scale_that_is_none_or_of_no_linear_is_refused(name: str, value: float, dit_bundle: Path) -> None:
    manifest = eight(Bundle.open(dit_bundle).manifest)
    with pytest.raises(InvalidRequest, match=re.escape(repr(name))):
        replace(manifest, fp8=Calibration(Calibrator.OWN, 10, {name: value})).check()


def test_engines_come_back_from_json_unchanged(copy: Path) -> None:
    manifest = compiled(copy)
    assert len(manifest.engines) == len(GRAPHS)
    assert Bundle.open(copy).manifest == manifest


@pytest.mark.parametrize(
    "change",
    [
        lambda engine: engine.update(graph="other"),
        lambda engine: engine.update(file="engines/none.engine"),
        lambda engine: engine.update(report="engines/none.json"),
        lambda engine: engine.pop("key"),
        lambda engine: engine.update(colour="green"),
        lambda engine: engine.update(gpus=None),
    ],
    ids=["another graph", "no file", "no report", "a field less", "a field more", "no GPUs"],
)
def test_an_engine_that_the_bundle_does_not_hold_is_refused(change: Change, copy: Path) -> None:
    compiled(copy)
    change_manifest(copy, lambda data: change(data["engines"][2]))
    refuse(copy, "manifest: .*(field|is not among the files)")


# --- stripped and copied bundles


def test_a_stripped_bundle_opens_with_its_engines_and_without_graphs(copy: Path) -> None:
    before = compiled(copy)
    stripped = strip_graphs(copy, before)
    assert Bundle.open(copy).manifest == stripped
    assert before.files.keys() - stripped.files.keys() == {n for n in before.files if n.startswith("graphs/")}
    assert replace(stripped, files=before.files) == before
    assert not (copy / "graphs").exists()


def test_a_stripped_bundle_still_has_its_constants(copy: Path) -> None:
    before = Bundle.open(copy).constants()
    strip_graphs(copy, compiled(copy))
    after = Bundle.open(copy).constants()
    assert [name for name in before if not np.array_equal(before[name], after[name])] == []


def test_a_stripped_bundle_says_where_its_graphs_are_not(copy: Path) -> None:
    strip_graphs(copy, compiled(copy))
    bundle = Bundle.open(copy)
    wanted = r"was stripped to its tensorrt engines and holds no graphs; .* build it without --strip-graphs$"
    for graph in GRAPHS:
        with pytest.raises(BundleError, match=wanted):
            bundle.graph(graph)


def test_a_graph_with_neither_file_nor_engine_is_refused_by_name(copy: Path) -> None:
    strip_graphs(copy, compiled(copy, GRAPHS[:-1]))
    refuse(copy, f"lists no file for graph '{GRAPHS[-1]}'")


def test_a_copied_bundle_is_the_same_files_without_the_manifest(copy: Path, place: Path) -> None:
    bundle = Bundle.open(copy)
    bundle.copy(place)
    files = {path.relative_to(place).as_posix(): path for path in place.rglob("*") if path.is_file()}
    assert files.keys() == bundle.manifest.files.keys()
    assert {path.stat().st_nlink for path in files.values()} == {1}  # an edit of one bundle is no edit of the other
    assert write_manifest(place, bundle.manifest) == bundle.manifest
    assert Bundle.open(place).manifest == bundle.manifest


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_bundle_is_copied_where_the_kernel_cannot(
    number: int, copy: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse_copy(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "copy_file_range", refuse_copy)
    bundle = Bundle.open(copy)
    bundle.copy(place)
    write_manifest(place, bundle.manifest)
    assert Bundle.open(place).manifest == bundle.manifest


# --- drafts that end well


def test_a_draft_takes_its_place_when_the_block_ends(place: Path) -> None:
    with staging_folder(place / "deep" / "new.ilf", force=False) as draft:
        fill(draft)
        assert not (place / "deep" / "new.ilf").exists()
    assert content(place / "deep" / "new.ilf") == ["new", "new"]
    assert listing(place / "deep") == ["new.ilf"]


def test_a_draft_lies_on_the_file_system_of_its_place(place: Path) -> None:
    with staging_folder(place / "new.ilf", force=False) as draft:
        assert draft.parent == place
        fill(draft)


def test_a_relative_place_is_relative_to_the_folder_of_the_start(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    with staging_folder("new.ilf", force=False) as draft:
        fill(draft)
        monkeypatch.chdir("/")
    assert listing(place) == ["new.ilf"]


def test_force_replaces_a_bundle_when_the_block_ends(place: Path) -> None:
    old = stand_in(place / "a.ilf")
    (old / "only in the old").write_text("old")
    with staging_folder(old, force=True) as draft:
        fill(draft)
        assert content(old) == ["old", "old", "old"]
    assert content(old) == ["new", "new"]
    assert listing(place) == ["a.ilf"]


def test_force_is_not_needed_where_nothing_stands(place: Path) -> None:
    with staging_folder(place / "a.ilf", force=True) as draft:
        fill(draft)
    assert content(place / "a.ilf") == ["new", "new"]


def test_a_linked_bundle_is_replaced_and_its_target_kept(place: Path) -> None:
    target = stand_in(place / "target.ilf")
    (place / "a.ilf").symlink_to(target)
    with staging_folder(place / "a.ilf", force=True) as draft:
        fill(draft)
    assert content(place / "a.ilf") == ["new", "new"]
    assert [name for name in listing(place) if name.startswith(".")] == []


# --- drafts that are refused


def test_an_existing_bundle_needs_force(place: Path) -> None:
    old = stand_in(place / "a.ilf")
    with pytest.raises(BundleError, match="exists; pass --force to replace it"):
        build(old, never)
    assert content(old) == ["old", "old"]


@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize("what", ["folder", "empty folder", "file", "folder with a folder manifest.json"])
def test_what_is_not_a_bundle_is_never_replaced(what: str, force: bool, place: Path) -> None:
    output = place / "thesis"
    if what == "file":
        output.write_text("mine")
    else:
        output.mkdir()
    if what == "folder":
        (output / "chapter").write_text("mine")
    if "manifest" in what:
        (output / MANIFEST_FILE).mkdir()
    before = [path.name for path in sorted(place.rglob("*"))]
    with pytest.raises(BundleError, match="exists"):
        build(output, never, force=force)
    assert [path.name for path in sorted(place.rglob("*"))] == before


def test_what_appeared_during_the_build_is_never_replaced(place: Path) -> None:
    output = place / "thesis"

    def body(draft: Path) -> None:
        fill(draft)
        output.mkdir()
        (output / "chapter").write_text("mine")

    with pytest.raises(BundleError, match="exists"):
        build(output, body)
    assert content(output) == ["mine"]


def test_a_bundle_that_appeared_during_the_build_needs_force(place: Path) -> None:
    def body(draft: Path) -> None:
        fill(draft)
        stand_in(place / "a.ilf", "of another build")

    with pytest.raises(BundleError, match="exists"):
        build(place / "a.ilf", body)
    assert content(place / "a.ilf") == ["of another build"] * 2


@pytest.mark.parametrize(
    "output", ["file/a.ilf", "/proc/a.ilf", "x" * 300, "a\0b"], ids=["file", "/proc", "long", "NUL"]
)
def test_a_place_that_cannot_be_written_is_a_bundle_error(output: str, place: Path) -> None:
    (place / "file").write_text("")
    with pytest.raises(BundleError, match=r"cannot write .*choose"):
        build(place / output, never)
    assert listing(place) == ["file"]


# --- drafts whose block fails


@pytest.mark.parametrize("error", [RuntimeError, InvalidRequest, MissingDependency, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("force", [True, False], ids=["over an old one", "new"])
def test_a_failing_block_leaves_nothing_new_and_the_old_bundle(
    error: type[BaseException], force: bool, place: Path
) -> None:
    output = place / "a.ilf"
    if force:
        stand_in(output)

    def body(draft: Path) -> None:
        fill(draft, "half")
        raise error("in the middle")

    with pytest.raises(error):
        build(output, body, force=force)
    assert listing(place) == (["a.ilf"] if force else [])
    assert not force or content(output) == ["old", "old"]


@pytest.mark.parametrize("call", ["pathlib.Path.mkdir", "fcntl.flock"])
def test_a_signal_while_the_draft_is_made_leaves_nothing(
    call: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = pkgutil.resolve_name(call)

    def then_stopped(*args: Any, **kwargs: Any) -> None:
        done(*args, **kwargs)
        if listing(place):
            raise SystemExit

    monkeypatch.setattr(call, then_stopped)
    with pytest.raises(SystemExit):
        build(place / "a.ilf", never)
    monkeypatch.undo()
    assert listing(place) == []


def test_a_full_disk_is_a_bundle_error_that_says_so(place: Path) -> None:
    old = stand_in(place / "a.ilf")

    def body(draft: Path) -> None:
        fill(draft, "half")
        Path("/dev/full").write_text("the kernel's own ENOSPC")

    with pytest.raises(BundleError, match=r"cannot write .*No space left on device; free some space") as caught:
        build(old, body, force=True)
    assert isinstance(caught.value.__cause__, OSError)
    assert listing(place) == ["a.ilf"]
    assert content(old) == ["old", "old"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM], ids=errno.errorcode.get)
def test_a_place_that_turns_read_only_is_a_bundle_error(number: int, place: Path) -> None:
    def body(draft: Path) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(BundleError, match=r"cannot write .*choose a writable --output"):
        build(place / "a.ilf", body)
    assert listing(place) == []


def test_a_read_that_fails_in_the_block_is_not_called_a_write(place: Path) -> None:
    with pytest.raises((OSError, IlfError)) as caught:
        build(place / "a.ilf", lambda draft: (place / "no such input").read_bytes())
    assert "cannot write" not in str(caught.value)
    assert "no such input" in str(caught.value)
    assert listing(place) == []


def test_a_draft_that_cannot_take_its_place_leaves_the_old_bundle(place: Path) -> None:
    old = stand_in(place / "a.ilf")
    with pytest.raises(BundleError):
        build(old, shutil.rmtree, force=True)
    assert content(old) == ["old", "old"]
    assert listing(place) == ["a.ilf"]


def test_a_second_build_of_the_process_does_not_harm_the_first(place: Path) -> None:
    def second(draft: Path) -> None:
        raise InvalidRequest("the second fails, at its start or here")

    def first(draft: Path) -> None:
        fill(draft)
        with pytest.raises(IlfError):
            build(place / "a.ilf", second)
        assert content(draft) == ["new", "new"]

    build(place / "a.ilf", first)
    assert content(place / "a.ilf") == ["new", "new"]


# --- builds that are killed


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + START_S
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "the child process did not begin"
        time.sleep(POLL_S)


@pytest.fixture
def sleeper(place: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A build of place/a.ilf that hangs in its block, and its draft."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPER, str(place / "a.ilf")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout
        draft = Path(process.stdout.readline().strip())
        assert draft.parent == place, process.communicate()
        yield process, draft
    finally:
        process.kill()
        process.communicate()


def test_a_killed_build_leaves_no_bundle(sleeper: tuple[subprocess.Popen[str], Path], place: Path) -> None:
    process, draft = sleeper
    process.kill()
    process.wait()
    assert draft.is_dir()
    assert not (place / "a.ilf").exists()
    with staging_folder(place / "a.ilf", force=False) as own:
        assert not draft.exists()
        fill(own)
    assert listing(place) == ["a.ilf"]


def test_a_killed_build_leaves_the_old_bundle(
    sleeper: tuple[subprocess.Popen[str], Path], place: Path, copy: Path
) -> None:
    process, draft = sleeper
    old = copy.rename(place / "a.ilf")
    process.kill()
    process.wait()
    Bundle.open(old)
    with staging_folder(old, force=True) as own:
        assert not draft.exists()
        Bundle.open(old)
        fill(own)
    assert listing(place) == ["a.ilf"]


def test_a_living_build_is_not_swept(sleeper: tuple[subprocess.Popen[str], Path], place: Path) -> None:
    _, draft = sleeper
    with staging_folder(place / "a.ilf", force=False) as own:
        fill(own)
        assert content(draft) == ["half"]
    assert content(draft) == ["half"]


@pytest.mark.parametrize(("event", "count"), [("os.rename", 1), ("os.rename", 2), ("shutil.rmtree", 1)])
def test_a_build_killed_while_it_replaces_a_bundle_loses_none(event: str, count: int, place: Path) -> None:
    output = stand_in(place / "a.ilf")
    command = [sys.executable, "-c", DIES_BEFORE, str(output), event, str(count)]
    done = subprocess.run(command, check=False, timeout=START_S)
    assert done.returncode in (0, -signal.SIGKILL)
    with pytest.raises(RuntimeError):
        build(output, fail, force=True)
    assert (output / MANIFEST_FILE).read_text() in ("old", "new")


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_draft_of_a_dead_process_is_swept_and_other_names_are_not(place: Path) -> None:
    pid = dead_pid()
    kept = [f".b.ilf.partial-{pid}", f".a.ilf.partial-{os.getppid()}", ".a.ilf.partial-x"]
    for name in (f".a.ilf.partial-{pid}", *kept):
        (place / name).mkdir()
    with staging_folder(place / "a.ilf", force=False) as draft:
        fill(draft)
    assert listing(place) == sorted([*kept, "a.ilf"])


def test_the_draft_of_a_dead_process_with_our_number_is_swept(place: Path) -> None:
    (place / f".a.ilf.partial-{os.getpid()}").mkdir()  # in a container every build may be process 1
    with staging_folder(place / "a.ilf", force=False) as draft:
        fill(draft)
    assert listing(place) == ["a.ilf"]


def test_a_name_with_wildcards_sweeps_its_own_drafts_only(place: Path) -> None:
    pid = dead_pid()
    for name in (f".[ab].ilf.partial-{pid}", f".a.ilf.partial-{pid}"):
        (place / name).mkdir()
    with staging_folder(place / "[ab].ilf", force=False) as draft:
        fill(draft)
    assert listing(place) == [f".a.ilf.partial-{pid}", "[ab].ilf"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "moment"),
    [
        (signal.SIGTERM, 143, "graphs/*.onnx"),
        (signal.SIGINT, 130, "."),
    ],
    ids=["SIGTERM while exporting", "SIGINT at the start"],
)
def test_a_stopped_command_leaves_nothing(number: int, code: int, moment: str, place: Path, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", small_dit(num_layers=2), (0, 0))
    command = ["build", "--checkpoint", str(checkpoint), "--output", str(place / "a.ilf"), "--batch", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ilf_trt.cli", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for(lambda: list(place.glob(".a.ilf*" if moment == "." else f".a.ilf*/{moment}")), process)
        process.send_signal(number)
        _, errors = process.communicate(timeout=START_S)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == code, errors
    assert listing(place) == []
    assert "Traceback" not in errors
