"""The command line: what it prints, what it writes, and one readable line for everything that it refuses."""

import json
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ilf_trt import __version__
from ilf_trt.contract.bundle import Bundle
from ilf_trt.contract.manifest import SCHEMA
from ilf_trt.model.base import load_backbone
from ilf_trt.model.checkpoint import fingerprint
from ilf_trt.runtime.picture.png import GAP, TILE
from tests.conftest import BLOCKS, CLASSES, FAILED, LOOP, TEXT_CHANNELS, Ran, Run, small_dit, write_checkpoint
from tests.manifests import change_manifest

COMMANDS = (
    *("build", "compile", "generate", "replay", "plan", "inspect", "verify"),
    *("cache", "prepare", "train", "train-demo"),
)
EXECUTABLE = Path(sys.executable).parent / "ilf-trt"
INTERRUPTED, TERMINATED = 130, 143
TIMEOUT_S = 120
# The paper's best caching baseline: 20 of 28 blocks, every second of 20 steps.
CACHE_BLOCK_FORWARDS = 360


def shell(*tokens: object) -> Ran:
    """The installed command."""
    ran = subprocess.run(
        [EXECUTABLE, *map(str, tokens)], capture_output=True, text=True, check=False, timeout=TIMEOUT_S
    )
    return Ran(ran.returncode, ran.stdout, ran.stderr)


@pytest.fixture
def copy(dit_bundle: Path, tmp_path: Path) -> Path:
    """A bundle that may be changed."""
    return Path(shutil.copytree(dit_bundle, tmp_path / "copy.ilf"))


@pytest.fixture
def below_a_file(tmp_path: Path) -> Path:
    """A place that cannot be written to, by root neither."""
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "below"


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    backbone = small_dit(num_layers=2, num_attention_heads=2)
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint", backbone, (0, 0))


# One for all: whichever build comes second takes the graphs out of the cache.
TINY_BUILD = ("--batch", 1, "--steps", 2, "--feedback", "all", "--no-guidance")
PLAN = ("plan", "--blocks", 28, "--loop", "8:19", "--steps", 10)


def test_without_a_command_every_command_is_listed(run: Run) -> None:
    ran = run()
    assert ran.code == 0
    assert [name for name in COMMANDS if name not in ran.out] == []


def test_help_lists_every_command(run: Run) -> None:
    ran = run("--help")
    assert (ran.code, ran.err) == (0, "")
    assert [name for name in COMMANDS if name not in ran.out] == []


@pytest.mark.parametrize("command", [*(name for name in COMMANDS if name != "cache"), "cache ls", "cache prune"])
def test_help_of_a_command_has_an_example(run: Run, command: str) -> None:
    ran = run(*command.split(), "--help")
    assert (ran.code, ran.err) == (0, "")
    assert f"ilf-trt {command}" in " ".join(ran.out.partition("Example")[2].split())


@pytest.mark.parametrize("command", ["build", "generate"])
def test_captions_are_cleaned_or_not_by_name(run: Run, command: str) -> None:
    printed = run(command, "--help").out
    assert "--clean-captions" in printed
    assert "--no-clean-captions" in printed


def test_version_is_the_packages(run: Run) -> None:
    assert run("--version").out.strip() == __version__


def test_plan_prints_a_row_a_step_and_the_cost(run: Run) -> None:
    ran = run(*PLAN)
    assert (ran.code, ran.err) == (0, "")
    for part in ("t_post", "feedback", "block forwards: 332"):
        assert part in ran.out
    assert ran.out.count("yes") == 4
    assert "956.1" in ran.out


def test_plan_as_json_has_the_cost_and_every_step(run: Run) -> None:
    data = run(*PLAN, "--json").data
    assert data["block_forwards"] == sum(step["block_forwards"] for step in data["steps"]) == 10 * 28 + 4 * 13
    assert [step["feedback"] for step in data["steps"]] == [True] * 2 + [False] * 6 + [True] * 2
    first = data["steps"][0]
    assert (first["t"], first["t_post"]) == (999, pytest.approx(999 - 100 * 12 / 28))
    assert all(step["t"] == step["t_post"] for step in data["steps"] if not step["feedback"])


def test_plan_with_the_papers_ratio_goes_past_the_next_step(run: Run) -> None:
    data = run(*PLAN, "--ratio", "n/m", "--json").data
    assert data["ratio"] == "n/m"
    assert data["steps"][0]["t_post"] == pytest.approx(999 - 100 * 28 / 12)
    assert data["steps"][0]["t_post"] < data["steps"][1]["t"]
    assert all(step["t_post"] >= 0 for step in data["steps"])


def test_plan_that_anneals_takes_smaller_steps_towards_the_end(run: Run) -> None:
    steps = run(*PLAN, "--rule", "anneal", "--feedback", "all", "--json").data["steps"]
    offsets = [step["t"] - step["t_post"] for step in steps]
    assert offsets[0] == pytest.approx(100 * 12 / 28)
    assert offsets[1] == pytest.approx(100 * 12 / 28 * 899 / 1000, rel=1e-2)
    assert offsets == sorted(offsets, reverse=True)
    assert min(offsets) == pytest.approx(10)


def test_plan_of_the_caching_baseline_costs_what_the_blocks_that_run_cost(run: Run) -> None:
    cache = ("plan", "--blocks", 28, "--steps", 20, "--cache-blocks", 20, "--cache-every", 2)
    assert f"block forwards: {CACHE_BLOCK_FORWARDS}" in run(*cache).out
    data = run(*cache, "--json").data
    assert data["block_forwards"] == CACHE_BLOCK_FORWARDS
    assert [step["block_forwards"] for step in data["steps"]] == [28, 8] * 10


def test_plan_without_feedback_needs_no_loop(run: Run) -> None:
    assert run("plan", "--blocks", 28, "--steps", 20, "--feedback", "none", "--json").data["block_forwards"] == 560


def test_inspect_shows_model_graphs_plan_and_sizes(run: Run, dit_bundle: Path) -> None:
    ran = run("inspect", dit_bundle)
    assert (ran.code, ran.err) == (0, "")
    text = " ".join(ran.out.split())
    for part in ("dit, 4 blocks, width 64", "sizes 8x8", "blocks 1 to 2", "fp32", "1:4:16", "class_labels int32 B"):
        assert part in text
    for part in ("loop_feedback", "next_latent", "DPMSolverMultistepScheduler", "t_post", "MiB", "hash checked"):
        assert part in text


def test_inspect_as_json_is_the_manifest(run: Run, pixart_bundle: Path) -> None:
    assert run("inspect", pixart_bundle, "--json").data == json.loads((pixart_bundle / "manifest.json").read_text())


def test_inspect_can_skip_the_hashes(run: Run, copy: Path) -> None:
    path = copy / "graphs" / "pre.onnx.data"
    path.write_bytes(bytes(path.stat().st_size))
    assert run("inspect", copy, "--no-check").code == 0


def test_generate_writes_a_grid_and_latents(run: Run, dit_bundle: Path, tmp_path: Path) -> None:
    picture, latents = tmp_path / "out" / "digits.png", tmp_path / "out" / "latents.npy"
    ran = run("generate", dit_bundle, "--labels", "3,7,0-2", "-o", picture, "--latents-out", latents, "--columns", 2)
    assert (ran.code, ran.err) == (0, "")
    array = np.load(latents, allow_pickle=False)
    assert (array.shape, array.dtype) == ((5, 1, 8, 8), np.float32)
    with Image.open(picture) as image:
        assert (image.format, image.size) == ("PNG", (2 * (TILE + GAP) + GAP, 3 * (TILE + GAP) + GAP))
    assert "5 pictures, 6 steps, 4 with feedback" in ran.out
    assert f"wrote {picture}" in ran.out
    assert f"wrote {latents}" in ran.out


def test_generate_is_repeated_by_its_seed_and_by_its_start_noise(run: Run, dit_bundle: Path, tmp_path: Path) -> None:
    noise = tmp_path / "noise.npy"
    np.save(noise, np.random.default_rng(0).standard_normal((2, 1, 8, 8)).astype(np.float32))
    made = {}
    for name, options in {
        "seed": ("--seed", 7),
        "same seed": ("--seed", 7),
        "other seed": ("--seed", 8),
        "each": ("--seed", "7,8"),
        "numpy": ("--seed", 7, "--noise", "numpy"),
        "latents": ("--latents-in", noise),
        "same latents": ("--latents-in", noise, "--seed", 3),
    }.items():
        out = tmp_path / f"{name}.npy"
        assert run("generate", dit_bundle, "--labels", "1,2", "--latents-out", out, *options).code == 0
        made[name] = np.load(out).tobytes()
    assert made["seed"] == made["same seed"]
    assert made["latents"] == made["same latents"]
    assert len({made[name] for name in ("seed", "other seed", "each", "numpy", "latents")}) == 5


def test_generate_follows_a_plan_that_plan_printed(run: Run, dit_bundle: Path, tmp_path: Path) -> None:
    loop = f"{LOOP[0]}:{LOOP[1]}"
    settings = ("--steps", 3, "--feedback", "first:1", "--rule", "uniform", "--ratio", "n/m")
    (tmp_path / "plan.json").write_text(run("plan", "--blocks", BLOCKS, "--loop", loop, *settings, "--json").out)
    made = []
    for name, options in {"file": ("--plan", tmp_path / "plan.json"), "settings": settings}.items():
        ran = run("generate", dit_bundle, "--labels", 1, "--latents-out", tmp_path / f"{name}.npy", *options)
        assert "3 steps, 1 with feedback" in ran.out
        made.append(np.load(tmp_path / f"{name}.npy"))
    np.testing.assert_array_equal(*made)


def test_generate_takes_text_from_an_npz(run: Run, pixart_bundle: Path, tmp_path: Path) -> None:
    text = np.ones((2, 3, TEXT_CHANNELS), np.float32)
    sizes = {"resolution": np.full((2, 2), 128, np.float32), "aspect_ratio": np.ones((2, 1), np.float32)}
    np.savez(tmp_path / "text.npz", text=text, negative_text=-text, **sizes)
    out = tmp_path / "latents.npy"
    ran = run("generate", pixart_bundle, "--conditions", tmp_path / "text.npz", "--latents-out", out)
    assert (ran.code, ran.err) == (0, "")
    assert np.load(out).shape == (2, 4, 16, 16)


def test_generate_names_a_file_as_it_is_called(run: Run, dit_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "a[" / "b] [bold]c.png"
    ran = run("generate", dit_bundle, "--labels", 1, "-o", path)
    assert f"wrote {path}" in ran.out
    assert path.is_file()


def test_verify_prints_every_difference(run: Run, dit_bundle: Path) -> None:
    ran = run("verify", dit_bundle)
    assert (ran.code, ran.err) == (0, "")
    for part in ("cond modulation_pre", "pre hidden", "loop_body features_post", "post next_latent", "trajectory"):
        assert part in ran.out


def test_verify_prints_the_table_and_refuses_what_is_past_the_limit(run: Run, dit_bundle: Path) -> None:
    ran = run("verify", dit_bundle, "--max-error", "1e-12")
    assert ran.code == FAILED
    assert "trajectory" in ran.out
    assert "the limit is 1e-12" in ran.err
    assert len(ran.err.strip().splitlines()) == 1


@pytest.mark.slow
def test_build_prints_sizes_times_and_the_next_command(run: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "tiny.ilf"
    ran = run("build", "--checkpoint", tiny_checkpoint, "-o", out, *TINY_BUILD)
    assert ran.code == 0, ran.err
    for part in ("trajectory", "load checkpoint", "export loop_body", "reference", "verify", "seconds", "MiB in"):
        assert part in ran.out
    assert f"{out}: " in ran.out
    assert f"next: ilf-trt generate {out} --labels 0-9 -o build/picture.png" in ran.out
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    manifest = Bundle.open(out).manifest
    assert (len(manifest.plan.steps), manifest.batch.fixed, manifest.spec.loop.size) == (2, True, 1)
    assert run("verify", out).code == 0
    assert run("generate", out, "--labels", CLASSES, "-o", tmp_path / "one.png").code == 0


@pytest.mark.slow
def test_a_build_on_a_fine_tune_is_a_named_choice_that_inspect_shows(
    run: Run, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    tuned, out = load_backbone(str(tiny_checkpoint)), tmp_path / "tuned.ilf"
    with torch.no_grad():
        tuned.proj_out_2.bias.add_(1)
    tuned.save_pretrained(tmp_path / "tuned")
    command = ("build", "--checkpoint", tiny_checkpoint, "--base", tmp_path / "tuned", "-o", out, *TINY_BUILD)
    run(*command).refused("is another model", "--base-differs for a fine-tune")
    assert run(*command, "--base-differs").code == 0
    manifest = Bundle.open(out).manifest
    assert (manifest.base_differs, manifest.base_sha256) == (True, fingerprint(tuned))
    assert "another than the feedback block was trained on" in run("inspect", out).out


@pytest.mark.slow
def test_build_past_the_limit_leaves_nothing_behind(run: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny.ilf"
    options = (*TINY_BUILD, "--max-error", "1e-12")
    run("build", "--checkpoint", tiny_checkpoint, "-o", out, *options).refused("the limit is 1e-12")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_build_leaves_the_old_bundle_whole(run: Run, copy: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    run("build", "--checkpoint", tmp_path / "none", "-o", copy, "--force").refused("none is not an ILF checkpoint")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "tokens",
    [("frobnicate",), (*PLAN, "--frobnicate"), ("inspect", "bundle", "frobnicate")],
    ids=["command", "option", "argument"],
)
def test_a_word_that_is_unknown_is_named(run: Run, tokens: tuple[object, ...]) -> None:
    run(*tokens).refused("frobnicate")


def test_an_unknown_command_is_told_every_known_one(run: Run) -> None:
    run("frobnicate").refused(*COMMANDS)


@pytest.mark.parametrize(
    ("tokens", "part"),
    [
        (("plan", "--blocks", "many", "--steps", 3), "--blocks"),
        (("plan", "--steps", 3), "--blocks"),
        ((*PLAN, "--rule", "linear"), "--rule"),
        ((*PLAN, "--ratio", "m/m"), "--ratio"),
        (("generate",), "BUNDLE"),
        (("build", "--output", "x"), "--checkpoint"),
    ],
)
def test_an_argument_of_the_wrong_kind_is_named(run: Run, tokens: tuple[object, ...], part: str) -> None:
    run(*tokens).refused(part)


@pytest.mark.parametrize("command", ["inspect", "verify", "generate"])
def test_a_missing_bundle_is_refused(run: Run, command: str, tmp_path: Path) -> None:
    options = ("--labels", 1, "-o", tmp_path / "a.png") if command == "generate" else ()
    run(command, tmp_path / "none.ilf", *options).refused("none.ilf is not a bundle", "ilf-trt build")


def test_a_bundle_name_that_no_file_system_takes_is_refused(run: Run) -> None:
    run("inspect", "x" * 300).refused("xxx")


@pytest.mark.parametrize(
    ("tokens", "part"),
    [
        (("--loop", "8:28"), "loop 8:28 does not fit a model of 28 blocks"),
        (("--loop", "9:8"), "loop 9:8 does not fit"),
        (("--loop", "8"), "loop '8' is not BEGIN:END"),
        ((), "--loop BEGIN:END"),
        (("--loop", "8:19", "--feedback", "sometimes"), "feedback pattern 'sometimes' is unknown"),
        (("--loop", "8:19", "--feedback", "10"), "feedback step 10 does not exist"),
        (("--loop", "8:19", "--scheduler", "none.json"), "none.json"),
        (("--cache-blocks", "29"), "cache of 29 blocks"),
        (("--cache-blocks", "8", "--cache-every", "0"), "every 0 steps"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(run: Run, tokens: tuple[str, ...], part: str) -> None:
    run("plan", "--blocks", 28, "--steps", 10, *tokens).refused(part)


@pytest.mark.parametrize("steps", ["0", "-1", "1001"])
def test_a_number_of_steps_that_the_scheduler_does_not_have_is_refused(run: Run, steps: str) -> None:
    run("plan", "--blocks", 28, "--loop", "8:19", "--steps", steps).refused(f"steps is {steps}")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"{", "scheduler.json"),
        (b"[]", "holds list"),
        (b"\xff\xfe", "scheduler.json"),
        (b"[" * 100_000, "scheduler.json"),
        (b"{}", "_class_name"),
        (b'{"_class_name": "DDPMScheduler"}', "DDPMScheduler"),
        (b'{"_class_name": "DDIMScheduler"}', "clip_sample"),
        (b'{"_class_name": "EulerDiscreteScheduler", "beta_start": NaN}', "NaN"),
        (b'{"_class_name": "EulerDiscreteScheduler", "trained_betas": [0.1]}', "trained_betas"),
    ],
)
def test_a_bad_scheduler_file_is_refused(run: Run, tmp_path: Path, content: bytes, part: str) -> None:
    (tmp_path / "scheduler.json").write_bytes(content)
    run(*PLAN, "--scheduler", tmp_path / "scheduler.json").refused(part)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--labels", CLASSES + 1), f"class_labels holds {CLASSES + 1}, expected 0 to {CLASSES}"),
        (("--labels", "a"), "'a' is no class; this model has no names of classes"),
        (("--labels", "9-3"), "labels '9-3' is empty"),
        (("--labels", "1,9-3"), "9-3"),
        (("--labels", "1-"), "labels '1-'"),
        (("--labels", "3", "--size", "8by8"), "size '8by8' is not HEIGHTxWIDTH"),
        (("--labels", "3", "--size", "16x8"), "size 16x8 is not among the bundle's 8x8"),
        (("a red fox",), "this bundle has no text encoder; it takes class_labels"),
        (("--prompts", "none.txt"), "none.txt is not a readable text file"),
        (("--labels", "3", "--negative-prompt", "blurry"), "negative_prompt is given without a prompt"),
        ((), "'class_labels' is missing"),
        (("--labels", 1, "--seed", "1,2"), "2 seeds for 1 pictures"),
        (("--labels", 1, "--seed", "one"), "seed 'one' is not a list of numbers"),
        (("--labels", 1, "--noise", "cuda"), "--noise"),
        (("--labels", 1, "--columns", 0), "--columns"),
        (("--labels", 1, "--steps", 0), "steps is 0"),
        (("--labels", 1, "--feedback", "never"), "feedback pattern 'never' is unknown"),
        (("--labels", 1, "--guidance-scale", "nan"), "--guidance-scale"),
        (("--labels", 1, "--guidance-scale", "1e39"), "guidance_scale"),
        (("--labels", 1, "--plan", "none.json"), "none.json"),
        (("--labels", 1, "--latents-in", "none.npy"), "none.npy"),
        (("--labels", 1, "--conditions", "none.npz"), "none.npz"),
    ],
)
def test_generate_refuses_what_does_not_fit(
    run: Run, dit_bundle: Path, tmp_path: Path, options: tuple[object, ...], part: str
) -> None:
    run("generate", dit_bundle, "-o", tmp_path / "a.png", *options).refused(part)
    assert list(tmp_path.iterdir()) == []


def test_generate_with_nothing_to_write_is_refused(run: Run, dit_bundle: Path) -> None:
    run("generate", dit_bundle, "--labels", 1).refused("nothing to write", "-o", "--latents-out")


def test_generate_of_latents_that_are_no_pixels_is_refused_before_it_starts(
    run: Run, pixart_bundle: Path, tmp_path: Path
) -> None:
    run("generate", pixart_bundle, "-o", tmp_path / "a.png").refused("latents of 4 channels are not pixels", "VAE")


@pytest.mark.parametrize(("option", "name"), [("-o", "a.png"), ("--latents-out", "a.npy")])
def test_generate_to_a_place_that_cannot_be_written_is_refused(
    run: Run, dit_bundle: Path, below_a_file: Path, option: str, name: str
) -> None:
    run("generate", dit_bundle, "--labels", 1, option, below_a_file / name).refused("cannot write", "choose another")


@pytest.mark.parametrize(("option", "name"), [("-o", "a.jpg"), ("-o", "a"), ("--latents-out", "a.png")])
def test_a_name_of_another_format_is_refused(
    run: Run, dit_bundle: Path, tmp_path: Path, option: str, name: str
) -> None:
    run("generate", dit_bundle, "--labels", 1, option, tmp_path / name).refused("writes a .", "give a name that ends")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [("--steps", "10.5"), ("--steps", "1e1"), ("--steps", "\u0661"), ("--threads", "1.0"), ("--guidance-scale", "inf")],
)
def test_numbers_are_read_as_they_are_written(
    run: Run, dit_bundle: Path, tmp_path: Path, options: tuple[str, str]
) -> None:
    run("generate", dit_bundle, "--labels", 1, "-o", tmp_path / "a.png", *options).refused(options[0])


def test_a_seed_may_be_negative_as_in_torch(run: Run, dit_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    assert run("generate", dit_bundle, "--labels", 1, "--seed", "-1", "-o", out).code == 0
    assert out.is_file()


NPY_HEADER = b"\x93NUMPY\x01\x00"


@pytest.mark.parametrize(
    "content",
    [b"", b"junk", NPY_HEADER, NPY_HEADER + b"\x10\x00{'descr': evil}\n", b"PK\x03\x04 cut short"],
    ids=["empty", "junk", "cut header", "bad header", "cut zip"],
)
@pytest.mark.parametrize("option", ["--latents-in", "--conditions"])
def test_a_bad_npy_is_refused(run: Run, dit_bundle: Path, tmp_path: Path, option: str, content: bytes) -> None:
    (tmp_path / "bad.npy").write_bytes(content)
    out = tmp_path / "a.png"
    run("generate", dit_bundle, "--labels", 1, option, tmp_path / "bad.npy", "-o", out).refused("bad.npy")


def test_labels_come_from_a_file_of_conditions_unless_they_are_given(
    run: Run, dit_bundle: Path, tmp_path: Path
) -> None:
    np.savez(tmp_path / "labels.npz", class_labels=np.array([3, 8], np.int32))

    def latents(*options: object) -> Any:
        ran = run("generate", dit_bundle, *options, "--seed", 1, "--latents-out", tmp_path / "out.npy")
        assert ran.code == 0, ran.err
        return np.load(tmp_path / "out.npy")

    of_file = latents("--conditions", tmp_path / "labels.npz")
    np.testing.assert_array_equal(of_file, latents("--labels", "3,8"))
    both = latents("--conditions", tmp_path / "labels.npz", "--labels", "1,2")
    np.testing.assert_array_equal(both, latents("--labels", "1,2"))


@pytest.mark.parametrize("option", ["--latents-in", "--conditions"])
def test_a_pickle_is_refused_and_not_loaded(run: Run, dit_bundle: Path, tmp_path: Path, option: str) -> None:
    np.save(tmp_path / "bad.npy", np.array([{}], object), allow_pickle=True)
    out = tmp_path / "a.png"
    run("generate", dit_bundle, "--labels", 1, option, tmp_path / "bad.npy", "-o", out).refused("bad.npy", "pickle")


@pytest.mark.parametrize("name", ["seed", "plan", "latents", "guidance_scale", "self", "text"])
def test_an_array_that_is_no_condition_is_refused(run: Run, dit_bundle: Path, tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "bad.npz", "w") as archive:  # numpy.savez cannot name an array `self`
        for array in ("class_labels", name):
            with archive.open(f"{array}.npy", "w") as file:
                np.save(file, np.array([1]))
    ran = run("generate", dit_bundle, "--conditions", tmp_path / "bad.npz", "-o", tmp_path / "a.png")
    ran.refused(f"'{name}' is not a condition")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"steps": []}, "step plan"),
        ({"blocks": float("inf")}, "step plan"),
        ({"blocks": BLOCKS + 1}, "block forwards"),
        ({"rule": "linear"}, "linear"),
        ({"initial_scale": float("nan")}, "step plan"),
    ],
)
def test_a_bad_plan_file_is_refused(
    run: Run, dit_bundle: Path, tmp_path: Path, change: dict[str, Any], part: str
) -> None:
    plan = run("plan", "--blocks", BLOCKS, "--loop", "1:2", "--steps", 3, "--json").data
    (tmp_path / "plan.json").write_text(json.dumps({**plan, **change}))
    options = ("--labels", 1, "--plan", tmp_path / "plan.json", "-o", tmp_path / "a.png")
    run("generate", dit_bundle, *options).refused(part)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("t", float("nan")),
        ("t_post", float("inf")),
        ("solver", [float("nan")] * 6),
        ("solver", [1.0]),
        ("feedback", "false"),
    ],
)
def test_a_plan_file_with_a_bad_step_is_refused(
    run: Run, dit_bundle: Path, tmp_path: Path, name: str, value: object
) -> None:
    plan = run("plan", "--blocks", BLOCKS, "--loop", "1:2", "--steps", 3, "--json").data
    plan["steps"][1][name] = value
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    options = ("--labels", 1, "--plan", tmp_path / "plan.json", "-o", tmp_path / "a.png")
    run("generate", dit_bundle, *options).refused("step plan")


@pytest.mark.parametrize("command", ["inspect", "verify", "generate"])
def test_a_file_of_another_hash_is_refused(run: Run, copy: Path, tmp_path: Path, command: str) -> None:
    path = copy / "graphs" / "loop_body.onnx.data"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    options = ("--labels", 1, "-o", tmp_path / "a.png") if command == "generate" else ()
    run(command, copy, *options).refused("loop_body.onnx.data has sha256", "copy the bundle again")


def test_a_newer_schema_is_refused(run: Run, copy: Path) -> None:
    change_manifest(copy, lambda data: data.update(schema=SCHEMA + 1))
    run("verify", copy).refused(f"manifest schema is {SCHEMA + 1}, this version reads {SCHEMA}; upgrade ilf-trt")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch", {"min": "1", "opt": 4, "max": 16}),
        ("graphs", []),
        ("scales", [0.1]),
        ("guidance_scale", 1e300),
        ("files", {}),
    ],
)
def test_a_manifest_that_does_not_hold_together_is_refused(run: Run, copy: Path, name: str, value: object) -> None:
    change_manifest(copy, lambda data: data.update({name: value}))
    run("verify", copy).refused()


def test_inspect_shows_a_manifest_as_it_is_written(run: Run, copy: Path) -> None:
    change_manifest(copy, lambda data: data["tools"].update(odd="[/bold] 1.0"))
    assert "[/bold] 1.0" in run("inspect", copy).out


def test_build_over_a_bundle_needs_force(run: Run, dit_checkpoint: Path, copy: Path) -> None:
    run("build", "--checkpoint", dit_checkpoint, "-o", copy).refused("copy.ilf exists; pass --force")


def test_build_never_replaces_what_is_no_bundle(run: Run, dit_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("cat")
    run("build", "--checkpoint", dit_checkpoint, "-o", tmp_path / "photos", "--force").refused("is not a bundle")
    assert (tmp_path / "photos" / "cat.png").read_text() == "cat"


def test_build_to_a_place_that_cannot_be_written_is_refused(run: Run, dit_checkpoint: Path, below_a_file: Path) -> None:
    run("build", "--checkpoint", dit_checkpoint, "-o", below_a_file / "x.ilf").refused("cannot write")


def test_build_of_a_missing_checkpoint_is_refused(run: Run, tmp_path: Path) -> None:
    run("build", "--checkpoint", tmp_path / "none", "-o", tmp_path / "x.ilf").refused(
        "none is not an ILF checkpoint", "ilf.json"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["ilf.safetensors", "transformer/diffusion_pytorch_model.safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_build_of_truncated_weights_is_refused(
    run: Run, tiny_checkpoint: Path, tmp_path: Path, name: str, kept: float
) -> None:
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(content[: int(kept * len(content))])
    run("build", "--checkpoint", checkpoint, "-o", tmp_path / "x.ilf").refused(str(checkpoint / Path(name).parent))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--batch", "3:2:1"), "batch '3:2:1' is out of order"),
        (("--batch", "0"), "batch '0'"),
        (("--batch", "many"), "batch 'many' is neither"),
        (("--precision", "int8"), "--precision"),
        (("--feedback", "sometimes"), "feedback pattern 'sometimes'"),
        (("--steps", "0"), "steps is 0"),
        (("--scheduler", "none.json"), "none.json"),
        (("--base", "none/of/these"), "base none/of/these is not a folder"),
        (("--guidance-scale", "nan"), "guidance"),
    ],
)
def test_build_refuses_an_option_before_it_exports(
    run: Run, tiny_checkpoint: Path, tmp_path: Path, options: tuple[str, ...], part: str
) -> None:
    run("build", "--checkpoint", tiny_checkpoint, "-o", tmp_path / "x.ilf", *options).refused(part)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text_tokens", [0, -3])
def test_build_refuses_a_text_without_tokens_before_it_exports(
    run: Run, pixart_checkpoint: Path, tmp_path: Path, text_tokens: int
) -> None:
    ran = run("build", "--checkpoint", pixart_checkpoint, "-o", tmp_path / "x.ilf", "--text-tokens", text_tokens)
    ran.refused("text")
    assert "ONNX Runtime" not in ran.err


def test_the_installed_command_prints_a_plan() -> None:
    ran = shell(*PLAN, "--json")
    assert (ran.code, ran.err, ran.data["block_forwards"]) == (0, "", 332)


def test_the_installed_command_refuses_in_one_line(tmp_path: Path) -> None:
    shell("inspect", tmp_path / "none.ilf").refused("none.ilf is not a bundle")


def test_a_reader_that_leaves_early_is_no_error(dit_bundle: Path) -> None:
    command = [EXECUTABLE, "inspect", dit_bundle, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == ""


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, TERMINATED), (signal.SIGINT, INTERRUPTED)])
def test_a_stopped_build_leaves_nothing_behind(
    tiny_checkpoint: Path, tmp_path: Path, sent: signal.Signals, code: int
) -> None:
    command = [EXECUTABLE, "build", "--checkpoint", tiny_checkpoint, "-o", tmp_path / "x.ilf"]
    deadline = time.monotonic() + TIMEOUT_S
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not any(tmp_path.iterdir()) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(sent)
        _, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, "Traceback" in err) == (code, False), err
    assert list(tmp_path.iterdir()) == []
