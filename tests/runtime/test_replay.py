"""Pictures carry what made them and are made again from it; a stranger's PNG is refused in time and memory."""

import json
import math
import resource
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from struct import pack
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ilf_trt import __version__
from ilf_trt.contract.bundle import MANIFEST_FILE
from ilf_trt.contract.document import canonical
from ilf_trt.contract.stamp import DIGEST
from ilf_trt.errors import MESSAGE_CHARS, IlfError, InvalidRequest
from ilf_trt.runtime import Pipeline, Result
from ilf_trt.runtime.commands import DIFFERS
from ilf_trt.runtime.picture import png_file
from ilf_trt.runtime.picture.png import encoded_png, grid
from ilf_trt.runtime.picture.png_file import KEYWORD, SIGNATURE, PngFile
from ilf_trt.runtime.provenance import MOST_BYTES, Provenance, changes, digest_of, is_folder_name
from ilf_trt.runtime.replay import Agreement, find_bundle, replay
from ilf_trt.runtime.start_noise import DLPACK_CUDA
from ilf_trt.runtime.text.prompts import Prompts
from tests.conftest import Run
from tests.manifests import change_manifest
from tests.test_hostile_checkpoints import VALUES, places, put

MOST_S, MOST_MIB = 5.0, 100.0
BOMB = 1 << 26  # bytes of one colour, 64 KiB once they are packed
MADE = ("--labels", "3,8", "--seed", "5,6", "--steps", 2, "--columns", 1)
Chunks = list[tuple[bytes, bytes]]


@pytest.fixture(scope="module")
def pipeline(dit_build: Any) -> Iterator[Pipeline]:
    with Pipeline.load(dit_build.bundle.path, threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def result(pipeline: Pipeline) -> Result:
    return pipeline.generate(class_labels=[3, 8], seed=[5, 6], steps=2)


@pytest.fixture(scope="module")
def provenance(result: Result) -> Provenance:
    return result.provenance(columns=1)


@pytest.fixture(scope="module")
def picture(result: Result, provenance: Provenance) -> bytes:
    """The PNG of two pictures, one below the other."""
    assert result.pixels is not None
    return encoded_png(grid(result.pixels, 1), provenance.encoded())


def chunks_of(content: bytes) -> Chunks:
    place, found = len(SIGNATURE), []
    while place < len(content):
        length = int.from_bytes(content[place : place + 4], "big")
        found.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + length]))
        place += 12 + length
    return found


def png_of(chunks: Chunks) -> bytes:
    """A PNG of any chunks, with checksums that fit."""
    return SIGNATURE + b"".join(
        pack(">I", len(body)) + kind + body + pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def with_record(picture: bytes, record: bytes) -> bytes:
    text = KEYWORD.encode() + b"\0" + record
    return png_of([(kind, text if kind == b"tEXt" else body) for kind, body in chunks_of(picture)])


def read(folder: Path, content: bytes) -> PngFile:
    (folder / "read.png").write_bytes(content)
    return PngFile.read(folder / "read.png")


def bounded(call: Callable[[], object]) -> bool:
    """Whether the call goes well; it must end in time and memory, and what it raises is of this package in one line."""
    begin_s, before_kib, message = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, None
    try:
        call()
    except IlfError as error:
        message = str(error)
    assert message is None or (message.isprintable() and len(message) <= MESSAGE_CHARS)
    assert time.monotonic() - begin_s < MOST_S
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib) / 1024 < MOST_MIB
    return message is None


def test_a_record_says_what_made_the_pictures(pipeline: Pipeline, result: Result, provenance: Provenance) -> None:
    origin = provenance.origin
    assert origin.bundle == pipeline.bundle.path.name
    assert origin.bundle_sha256 == json.loads((pipeline.bundle.path / MANIFEST_FILE).read_text())[DIGEST]
    assert origin.library.startswith("onnxruntime 1.")
    assert origin.device
    assert origin.ilf_trt == __version__
    assert (provenance.seed, provenance.labels, provenance.pictures, provenance.columns) == ("5,6", "3,8", 2, 1)
    assert (provenance.plan, provenance.size) == (result.plan, (8, 8))
    assert str(pipeline.bundle.path.parent) not in provenance.encoded().decode()


def test_a_record_comes_back_from_its_text_and_stays_as_it_is(provenance: Provenance) -> None:
    assert Provenance.decoded(provenance.encoded()) == provenance


def test_low_memory_records_where_its_parts_ran(pipeline: Pipeline, provenance: Provenance) -> None:
    with Pipeline.load(pipeline.bundle.path, low_memory=True, threads=1) as sequential:
        origin = sequential.generate(class_labels=[3, 8], seed=[5, 6], steps=2).provenance(1).origin
    assert origin == provenance.origin


def test_seeds_of_a_generator_are_recorded(pipeline: Pipeline) -> None:
    made = pipeline.generate(class_labels=[1, 2], seed=(seed for seed in (3, 4)), steps=1)
    assert made.provenance().seed == "3,4"


def test_conditions_and_start_noise_are_recorded_as_their_digests(pixart_bundle: Path) -> None:
    noise = np.random.default_rng(0).standard_normal((1, 4, 16, 16), np.float32)
    text = {name: np.ones((1, 7, 32), np.float32) for name in ("text", "negative_text")}
    with Pipeline.load(pixart_bundle, threads=1) as pipe:
        made = pipe.generate(latents=noise, steps=1, **text).provenance()
    assert made.conditions_sha256 == {name: digest_of(array) for name, array in text.items()}
    assert (made.seed, made.latents_sha256) == (None, digest_of(noise))
    assert made.arguments(text, noise)["latents"] is noise
    assert made.arguments(text, noise)["text"] is text["text"]
    with pytest.raises(InvalidRequest, match=r"only a digest of; pass --conditions FILE\.npz"):
        made.arguments({}, noise)
    with pytest.raises(InvalidRequest, match=r"only a digest of; pass --latents-in FILE\.npy"):
        made.arguments(text, None)
    with pytest.raises(InvalidRequest, match="--conditions is not the file"):
        made.arguments({**text, "text": text["text"] * 2}, noise)
    with pytest.raises(InvalidRequest, match="--latents-in is not the file"):
        made.arguments(text, -noise)


def test_files_that_a_picture_was_made_without_are_refused(provenance: Provenance) -> None:
    with pytest.raises(InvalidRequest, match="made without conditions; leave out --conditions"):
        provenance.arguments({"text": np.zeros(1)}, None)
    with pytest.raises(InvalidRequest, match="made without start noise; leave out --latents-in"):
        provenance.arguments({}, np.zeros(1, np.float32))
    assert provenance.arguments({"class_labels": np.array([3, 8])}, None)["class_labels"] == [3, 8]


def test_arrays_of_another_type_or_shape_have_another_digest() -> None:
    zeros = np.zeros((2, 3), np.float32)
    others = (zeros.T, zeros.astype(np.float16), zeros.astype(np.int32), zeros[:1], zeros + 1)
    assert len({digest_of(array) for array in (zeros, *others)}) == len(others) + 1
    assert digest_of(np.asfortranarray(np.arange(6.0).reshape(2, 3))) == digest_of(np.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize(("engine", "library"), [("tensorrt", "tensorrt 10.13.3.9"), ("onnxruntime", "onnxruntime 1.")])
def test_on_a_gpu_its_name_and_the_engine_library_are_recorded(
    engine: str, library: str, machine: Any, compiled: Callable[..., Path], dit_bundle: Path
) -> None:
    with Pipeline.load(compiled(dit_bundle), device="cuda:0", engine=engine) as pipe:
        origin = pipe.generate(class_labels=[1], steps=1).provenance().origin
    assert origin.device.startswith(f"{machine.cuda.devices[0].name}, sm90, driver")
    assert origin.library.startswith(library)


def test_start_noise_on_a_gpu_leaves_no_record(result: Result) -> None:
    class OnGpu:
        def __dlpack_device__(self) -> tuple[int, int]:
            return DLPACK_CUDA, 0

    with pytest.raises(InvalidRequest, match="start noise on a GPU"):
        replace(result, request=replace(result.request, latents=OnGpu())).provenance()


@pytest.mark.parametrize("name", ["demo", "demo-emoji"])
def test_a_packaged_bundle_is_recorded_and_found_by_its_name(
    name: str, run: Run, dit_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, Path]] = []

    def bundle_of(name: str, cache: Path) -> Path:
        asked.append((name, cache))
        return dit_bundle

    for user in ("commands", "replay"):
        monkeypatch.setattr(f"ilf_trt.runtime.{user}.bundle_of", bundle_of)
    path, again, cache = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "cache"
    assert run("generate", name, *MADE, "-o", path, "--cache-dir", cache).code == 0
    assert Provenance.decoded(PngFile.read(path).record).origin.bundle == name
    assert run("replay", path, "-o", again, "--cache-dir", cache).code == 0
    assert asked == [(name, cache)] * 2
    assert again.read_bytes() == path.read_bytes()


def test_a_folder_whose_name_fits_no_record_is_left_out(dit_bundle: Path, tmp_path: Path) -> None:
    odd = tmp_path / "a\nb"
    odd.symlink_to(dit_bundle)
    with Pipeline.load(odd, threads=1) as pipe:
        record = pipe.generate(class_labels=[1], steps=1).provenance()
    assert record.origin.bundle == ""
    assert Provenance.decoded(record.encoded()) == record


def test_a_record_that_is_too_large_is_refused_and_the_command_writes_the_picture_without_it(
    run: Run,
    dit_bundle: Path,
    tmp_path: Path,
    provenance: Provenance,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    many = replace(
        provenance, pictures=1 << 16, seed=None, latents_sha256="0" * 64, labels=",".join(["1" * 19] * 65536)
    )
    with pytest.raises(InvalidRequest, match=f"at most {MOST_BYTES} are kept"):
        many.encoded()
    monkeypatch.setattr("ilf_trt.runtime.provenance.MOST_BYTES", 100)
    assert run("generate", dit_bundle, *MADE, "-o", tmp_path / "a.png").code == 0
    assert "at most 100 are kept; the picture is written without it" in caplog.text
    assert [kind for kind, _ in chunks_of((tmp_path / "a.png").read_bytes())] == [b"IHDR", b"IDAT", b"IEND"]


def test_generate_records_and_replay_makes_the_same_file(run: Run, dit_bundle: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    assert run("generate", dit_bundle, *MADE, "-o", first).code == 0
    ran = run("replay", first, "--bundle", dit_bundle, "-o", again)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines() == ["the same to the bit", f"wrote {again}"]
    assert again.read_bytes() == first.read_bytes()


def test_without_metadata_a_picture_has_the_same_pixels_and_no_record(
    run: Run, dit_bundle: Path, tmp_path: Path, picture: bytes
) -> None:
    path = tmp_path / "bare.png"
    assert run("generate", dit_bundle, *MADE, "--no-metadata", "-o", path).code == 0
    assert chunks_of(path.read_bytes()) == [each for each in chunks_of(picture) if each[0] != b"tEXt"]
    run("replay", path, "--bundle", dit_bundle).refused("has no record", "--no-metadata")


def test_replay_finds_the_bundle_here_and_beside_the_picture(
    run: Run, dit_bundle: Path, tmp_path: Path, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "album" / "picture.png"
    path.parent.mkdir()
    path.write_bytes(picture)
    monkeypatch.chdir(dit_bundle.parent)
    assert run("replay", path).out == "the same to the bit\n"
    monkeypatch.chdir(tmp_path)
    run("replay", path).refused("no bundle with digest", "pass --bundle FOLDER")
    (path.parent / dit_bundle.name).symlink_to(dit_bundle)
    assert run("replay", path).out == "the same to the bit\n"


def test_a_bundle_in_a_folder_needs_no_home_folder(
    run: Run, dit_bundle: Path, tmp_path: Path, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless(_: str) -> Path:
        raise RuntimeError("no home")

    monkeypatch.delenv("ILF_TRT_CACHE", raising=False)
    monkeypatch.setattr("ilf_trt.assembly.cache_folder.user_cache_path", homeless)
    monkeypatch.chdir(dit_bundle.parent)
    path = tmp_path / "picture.png"
    path.write_bytes(picture)
    assert run("generate", dit_bundle, *MADE, "-o", tmp_path / "again.png").code == 0
    assert run("replay", path, "--bundle", dit_bundle).code == 0
    assert run("replay", path).code == 0
    run("generate", "demo", *MADE, "-o", tmp_path / "demo.png").refused("no home folder", "--cache-dir FOLDER")


def test_a_folder_of_the_name_with_another_digest_is_not_taken(
    dit_bundle: Path, tmp_path: Path, provenance: Provenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shutil.copytree(dit_bundle, tmp_path / dit_bundle.name)
    change_manifest(other, lambda data: data.update(guidance_scale=2.25))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidRequest, match="pass --bundle FOLDER"):
        find_bundle(provenance.origin, tmp_path / "picture.png", None)


def test_an_edited_picture_is_told_from_the_one_that_was_made(
    run: Run, dit_bundle: Path, tmp_path: Path, picture: bytes, provenance: Provenance
) -> None:
    pixels = read(tmp_path, picture).pixels()
    pixels[0, :10] += 3
    path = tmp_path / "edited.png"
    path.write_bytes(encoded_png(pixels, provenance.encoded()))
    ran = run("replay", path, "--bundle", dit_bundle)
    psnr_db = 10 * math.log10(255**2 / (10 * 3**2 / pixels.size))
    assert ran.code == DIFFERS
    share = 10 / (pixels.shape[0] * pixels.shape[1])
    assert f"by up to 3 of 255, in {share:.2%} of the pixels, PSNR {psnr_db:.1f} dB" in ran.out
    assert "the picture was edited" in ran.out


def test_another_bundle_device_library_and_version_are_named(
    run: Run, dit_bundle: Path, tmp_path: Path, picture: bytes, provenance: Provenance
) -> None:
    other = Path(shutil.copytree(dit_bundle, tmp_path / "other.ilf"))
    change_manifest(other, lambda data: data.update(guidance_scale=2.25))  # a default, which the request does not take
    origin = replace(provenance.origin, device="a GPU", library="tensorrt 1", ilf_trt="0.0.1")
    path = tmp_path / "picture.png"
    path.write_bytes(with_record(picture, replace(provenance, origin=origin).encoded()))
    ran = run("replay", path, "--bundle", other)
    digest = json.loads((other / MANIFEST_FILE).read_text())[DIGEST]
    assert ran.code == 0
    same, bundle, device, library, version = ran.out.splitlines()
    assert same == "the same to the bit"
    assert bundle == f"another bundle: {origin.bundle_sha256[:12]} then, {digest[:12]} now"
    assert device.startswith("another device: a GPU then, ")
    assert library == f"another library: tensorrt 1 then, {provenance.origin.library} now"
    assert version == f"another ilf-trt: 0.0.1 then, {__version__} now"
    assert changes(origin, origin) == []


def test_a_bundle_that_cannot_run_the_plan_is_named(
    run: Run, dit_bundle: Path, tmp_path: Path, picture: bytes, provenance: Provenance
) -> None:
    plan = replace(provenance.plan, blocks=5)
    steps = tuple(replace(step, block_forwards=step.block_forwards + 1) for step in plan.steps)
    origin = replace(provenance.origin, bundle_sha256="f" * 64)
    record = replace(provenance, origin=origin, plan=replace(plan, steps=steps)).encoded()
    path = tmp_path / "picture.png"
    path.write_bytes(with_record(picture, record))
    run("replay", path, "--bundle", dit_bundle).refused("is another bundle", "ffffffffffff", "plan is for 5 blocks")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "...", "a/b", "/etc", "a\\b", "a\0b", "a\nb", "x" * 201, " ", "\u202e"]
)
def test_a_recorded_name_is_the_name_of_one_folder(name: str, provenance: Provenance) -> None:
    assert not is_folder_name(name)
    data = provenance.as_json()
    data["origin"]["bundle"] = name
    if name:
        with pytest.raises(InvalidRequest):
            Provenance.from_json(data)
    with pytest.raises(InvalidRequest, match="pass --bundle"):
        find_bundle(replace(provenance.origin, bundle=name), Path("picture.png"), None)


@pytest.mark.parametrize(
    ("field", "value", "part"),
    [
        ("schema", 2, "upgrade ilf-trt"),
        ("schema", True, "schema is True|has schema True"),
        ("seed", "1,2,3", "3 seeds for 2 pictures"),
        ("seed", "9" * 21, "not a list of numbers"),
        ("seed", None, "neither"),
        ("labels", "0-99999", "more than 65536"),
        ("labels", "1", "1 labels for 2 pictures"),
        ("prompts", ["x"], "1 prompts for 2 pictures"),
        ("prompts", ["x" * 10_001] * 2, "field missing or wrong"),
        ("pictures", 1 << 17, "field missing or wrong"),
        ("columns", 0, "field missing or wrong"),
        ("guidance_scale", 1e39, "guidance_scale"),
        ("plan", {}, "step plan"),
        ("noise", "dice", "field missing or wrong"),
        ("extra", 1, "unknown field"),
    ],
)
def test_a_record_that_no_generation_writes_is_refused(
    field: str, value: Any, part: str, provenance: Provenance
) -> None:
    with pytest.raises(InvalidRequest, match=part):
        Provenance.decoded(canonical({**provenance.as_json(), field: value}))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda chunks: [*chunks[:1], *chunks[2:]], "has no record"),
        (lambda chunks: [*chunks[:2], *chunks[1:]], "two records"),
        (lambda chunks: [chunks[1], chunks[0], *chunks[2:]], "does not begin with one header"),
        (lambda chunks: [chunks[0], *chunks], "does not begin with one header"),
        (lambda chunks: chunks[:-1], "ends early"),
        (lambda chunks: [chunks[0], (b"zTXt", chunks[1][1]), *chunks[2:]], "never compressed"),
        (lambda chunks: [chunks[0], (b"iTXt", chunks[1][1]), *chunks[2:]], "never compressed"),
        (lambda chunks: [chunks[0], (b"tEXt", b"ilf-trt\0" + b" " * (MOST_BYTES + 1)), *chunks[2:]], "at most"),
        (lambda chunks: [chunks[0], *[(b"tEXt", b"x\0")] * (1 << 16), *chunks[1:]], "more than 65536 chunks"),
        (lambda chunks: [(b"IHDR", pack(">IIBBBBB", 1 << 20, 1 << 20, 8, 0, 0, 0, 0)), *chunks[1:]], "expected 1 to"),
        (lambda chunks: [(b"IHDR", pack(">IIBBBBB", 0, 64, 8, 0, 0, 0, 0)), *chunks[1:]], "expected 1 to"),
        (lambda chunks: [(b"IHDR", pack(">IIBBBBB", 64, 64, 8, 3, 0, 0, 0)), *chunks[1:]], "was converted"),
        (lambda chunks: [(b"IHDR", b"short"), *chunks[1:]], "header of another length"),
    ],
)
def test_a_png_that_generate_did_not_write_is_refused(
    change: Callable[[Chunks], Chunks], part: str, picture: bytes, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequest, match=part):
        read(tmp_path, png_of(change(chunks_of(picture))))


def test_other_texts_and_unknown_chunks_are_passed_over(picture: bytes, tmp_path: Path) -> None:
    header, *rest = chunks_of(picture)
    bomb = (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(BOMB)))
    found = read(tmp_path, png_of([header, bomb, (b"tEXt", b"ilf-trt2\0x"), (b"prVt", b""), *rest]))
    assert bounded(found.pixels)
    np.testing.assert_array_equal(found.pixels(), read(tmp_path, picture).pixels())


def test_pixels_that_unpack_to_more_than_the_header_says_take_no_more_memory(picture: bytes, tmp_path: Path) -> None:
    header, text, _, end = chunks_of(picture)
    found = read(tmp_path, png_of([header, text, (b"IDAT", zlib.compress(bytes(BOMB), 9)), end]))
    bounded(found.pixels)


def test_our_bound_of_pixels_is_within_pillows() -> None:
    assert Image.MAX_IMAGE_PIXELS is not None
    assert png_file.MOST_PIXELS <= Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("content", [b"", b"GIF89a", SIGNATURE, SIGNATURE + b"\xff" * 12])
def test_what_is_no_png_is_refused_with_the_file_to_give(content: bytes, run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content)
    run("replay", tmp_path / "a.png").refused("a.png", "give a PNG as ilf-trt generate wrote it")


def test_a_missing_file_and_a_pipe_are_refused(run: Run, tmp_path: Path) -> None:
    run("replay", tmp_path / "missing.png").refused("missing.png cannot be read")
    run("replay", "/dev/zero").refused("/dev/zero cannot be read")


def test_damaged_pixels_are_refused_before_any_work(
    pipeline: Pipeline, provenance: Provenance, picture: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    png = read(tmp_path, picture)
    monkeypatch.setattr(Pipeline, "generate", lambda *_, **__: pytest.fail("it generated"))
    for origin in (provenance.origin, replace(provenance.origin, bundle_sha256="0" * 64)):
        with pytest.raises(InvalidRequest, match=r"^\S+read.png has damaged pixels"):
            replay(pipeline, replace(png, packed=png.packed[:-8]), replace(provenance, origin=origin), {}, None)


def test_a_record_for_more_than_the_picture_shows_is_refused_before_any_work(
    run: Run, dit_bundle: Path, tmp_path: Path, picture: bytes, provenance: Provenance
) -> None:
    many = replace(provenance, pictures=60_000, columns=10, labels=",".join(["1"] * 60_000), seed="1")
    path = tmp_path / "picture.png"
    path.write_bytes(with_record(picture, many.encoded()))
    begin_s = time.monotonic()
    run("replay", path, "--bundle", dit_bundle).refused("its record is of 408004x684", "cropped or scaled")
    assert time.monotonic() - begin_s < MOST_S


@pytest.mark.fuzz
@given(data=st.data())
def test_a_flipped_byte_is_refused_or_changes_nothing(data: st.DataObject, picture: bytes, tmp_path: Path) -> None:
    place, value = data.draw(st.integers(0, len(picture) - 1)), data.draw(st.integers(0, 255))
    flipped = bytearray(picture)
    flipped[place] = value
    found: list[PngFile] = []
    if bounded(lambda: found.append(read(tmp_path, bytes(flipped)))):
        assert bytes(flipped) == picture
        assert Provenance.decoded(found[0].record) == Provenance.decoded(read(tmp_path, picture).record)


@pytest.mark.fuzz
@given(data=st.data())
def test_chunks_of_an_attacker_are_refused_or_read_in_time_and_memory(
    data: st.DataObject, picture: bytes, tmp_path: Path
) -> None:
    chunks = chunks_of(picture)
    for _ in range(data.draw(st.integers(1, 4))):
        index = data.draw(st.integers(0, len(chunks) - 1))
        kind, body = chunks[index]
        body = data.draw(st.sampled_from((body, body[: len(body) // 2], b"", body * 2)) | st.binary(max_size=40))
        kind = data.draw(
            st.sampled_from((kind, b"IDAT", b"IHDR", b"tEXt", b"iTXt", b"zTXt", b"PLTE", b"acTL", b"\0\xff\n "))
        )
        chunks[index : index + data.draw(st.integers(0, 1))] = [(kind, body)]
    bounded(lambda: read(tmp_path, png_of(chunks)).pixels())


@pytest.mark.fuzz
@given(data=st.data())
def test_a_record_of_an_attacker_is_refused_or_served_in_time_and_memory(
    data: st.DataObject, picture: bytes, provenance: Provenance, pipeline: Pipeline, tmp_path: Path
) -> None:
    record = json.loads(provenance.encoded())
    for _ in range(data.draw(st.integers(1, 3))):
        put(record, data.draw(st.sampled_from(list(places(record)))), data.draw(VALUES))

    def serve() -> None:
        png = read(tmp_path, with_record(picture, json.dumps(record).encode("utf-8", "surrogatepass")))
        replay(pipeline, png, Provenance.decoded(png.record), {}, None)

    bounded(serve)


@pytest.mark.fuzz
@given(content=st.binary(max_size=200))
def test_any_text_in_place_of_the_record_is_refused(content: bytes) -> None:
    assert not bounded(lambda: Provenance.decoded(content))


def test_agreement_counts_levels_pixels_and_the_ratio() -> None:
    first = np.zeros((2, 2, 3), np.uint8)
    second = first.copy()
    second[0, 0] = (255, 0, 1)
    found = Agreement.of(first, second)
    assert (found.largest, found.share, found.same) == (255, 0.25, False)
    assert found.psnr_db == pytest.approx(10 * math.log10(255**2 / ((255**2 + 1) / 12)))
    assert Agreement.of(first, first) == Agreement(0, 0.0, math.inf)


def test_prompts_come_back_as_they_were_read(result: Result, provenance: Provenance) -> None:
    prompts = Prompts.of(["a red fox", "Füchse 狐 \x07"], "blurry", clean=True)
    request = replace(result.request, prompts=prompts, conditions={}, seed=7)
    made = Provenance.decoded(Provenance.of(request, provenance.origin, 2, 10).encoded())
    assert (made.prompts, made.negative_prompts) == (prompts.positive, ("blurry",))
    asked = made.arguments({}, None)
    assert Prompts.of(asked["prompt"], asked["negative_prompt"], clean=asked["clean_captions"]) == prompts
    assert (asked["seed"], asked["class_labels"]) == (7, None)
