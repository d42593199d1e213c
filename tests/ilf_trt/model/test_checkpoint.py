"""The checkpoint: what is written is read back, and what is missing, damaged or of another model is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file
from torch import Tensor

from ilf_trt import ILFModel, attach, load_ilf, save_ilf
from ilf_trt.contract.solver import DEFAULT_SCHEDULER
from ilf_trt.errors import CheckpointError, IlfError, UnsupportedBackbone
from ilf_trt.model.base import base_scheduler, base_source, load_backbone
from ilf_trt.model.checkpoint import fingerprint, read_checkpoint
from tests.conftest import CLASSES, LOOP, TEXT_CHANNELS, TEXT_TOKENS, small_dit, small_pixart
from tests.fitting_digests import Change, change_json, change_tensors

BASE_WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
BASE_CONFIG = "transformer/config.json"


@pytest.fixture
def copy(dit_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(dit_checkpoint, tmp_path / "copy"))


def refuse(folder: Path, message: str, error: type[IlfError] = CheckpointError) -> None:
    with pytest.raises(error, match=message):
        load_ilf(folder)


def trained(backbone: Any) -> ILFModel:
    """A model whose feedback block and scales are unlike any fresh one."""
    model = attach(backbone, LOOP)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.feedback.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def dit_output(model: ILFModel) -> Tensor:
    x = torch.randn(2, *model.adapter.latent, generator=torch.Generator().manual_seed(5))
    sample: Tensor = model(x, 700, torch.tensor([3, CLASSES]), t_post=650).sample
    return sample


@torch.no_grad()
def pixart_output(model: ILFModel) -> Tensor:
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(2, *model.adapter.latent, generator=generator)
    text = torch.randn(2, TEXT_TOKENS, TEXT_CHANNELS, generator=generator)
    sizes = {"resolution": torch.full((2, 2), 128.0), "aspect_ratio": torch.ones(2, 1)}
    sample: Tensor = model(x, text, 700, sizes, t_post=650).sample
    return sample


# --- there and back


@pytest.mark.parametrize(
    ("make", "output"),
    [(small_dit, dit_output), (lambda: small_pixart(sized=True), pixart_output)],
    ids=["dit", "pixart"],
)
def test_a_loaded_checkpoint_gives_the_same_output(
    make: Callable[[], Any], output: Callable[[ILFModel], Tensor], tmp_path: Path
) -> None:
    model = trained(make())
    save_ilf(model, tmp_path / "new" / "folder")
    loaded = load_ilf(tmp_path / "new" / "folder")
    assert loaded.loop == model.loop
    assert torch.equal(output(loaded), output(model))


def test_a_loaded_model_is_frozen_but_for_its_feedback(dit_checkpoint: Path) -> None:
    model = load_ilf(dit_checkpoint)
    assert {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"feedback"}
    assert not model.backbone.training


def test_only_the_feedback_is_in_its_file(dit_checkpoint: Path) -> None:
    names = load_file(dit_checkpoint / "ilf.safetensors").keys()
    assert names == attach(small_dit(), LOOP).feedback.state_dict().keys()


def test_a_base_may_lie_in_a_relative_folder(tmp_path: Path) -> None:
    model = trained(small_dit())
    small_dit().save_pretrained(tmp_path / "models" / "base")
    save_ilf(model, tmp_path / "models" / "ilf", base="../base")
    assert not (tmp_path / "models" / "ilf" / "transformer").exists()
    moved = (tmp_path / "models").rename(tmp_path / "moved")
    assert torch.equal(dit_output(load_ilf(moved / "ilf")), dit_output(model))


def test_a_base_may_lie_at_an_absolute_path(tmp_path: Path) -> None:
    model = trained(small_dit())
    small_dit().save_pretrained(tmp_path / "base")
    save_ilf(model, tmp_path / "ilf", base=str(tmp_path / "base"))
    moved = (tmp_path / "ilf").rename(tmp_path / "moved")
    assert torch.equal(dit_output(load_ilf(moved)), dit_output(model))


@pytest.mark.parametrize("inside", ["", "transformer"], ids=["the model", "a pipeline that holds it"])
@pytest.mark.parametrize("kind", [str, Path])
def test_the_base_can_be_overridden(inside: str, kind: type, copy: Path, tmp_path: Path) -> None:
    wanted = dit_output(load_ilf(copy))
    (copy / "transformer").rename(tmp_path / "gone")
    refuse(copy, "base transformer is not a folder.*--base")
    small_dit().save_pretrained(tmp_path / "base" / inside)
    assert torch.equal(dit_output(load_ilf(copy, base=kind(tmp_path / "base"))), wanted)


def test_the_facts_of_the_training_are_kept(tmp_path: Path) -> None:
    facts = {"iterations": 3, "data": "digits"}
    save_ilf(attach(small_dit(), LOOP), tmp_path, training=facts)
    assert read_checkpoint(tmp_path).training == facts


def test_a_checkpoint_can_be_written_over(copy: Path) -> None:
    model = trained(small_dit())
    save_ilf(model, copy)
    assert torch.equal(dit_output(load_ilf(copy)), dit_output(model))


# --- the scheduler beside it


@pytest.mark.parametrize("place", ["ilf", "base", "."], ids=["the checkpoint", "the base", "a pipeline"])
def test_a_scheduler_is_found_beside(place: str, tmp_path: Path) -> None:
    small_dit().save_pretrained(tmp_path / "base")
    save_ilf(attach(small_dit(), LOOP), tmp_path / "ilf", base="../base")
    DDIMScheduler().save_pretrained(tmp_path / place / "scheduler")
    assert read_checkpoint(tmp_path / "ilf").scheduler_config()["_class_name"] == "DDIMScheduler"


def test_without_a_scheduler_it_is_dpm_solver_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_ilf(attach(small_dit(), LOOP), tmp_path)
    assert read_checkpoint(tmp_path).scheduler_config() == DEFAULT_SCHEDULER
    assert f"{tmp_path} has no scheduler: DPM-Solver++" in caplog.text


def test_a_damaged_scheduler_is_refused(copy: Path) -> None:
    (copy / "scheduler" / "scheduler_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json is not readable JSON"):
        read_checkpoint(copy).scheduler_config()


# --- the fingerprint of the base


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_lossless_cast_keeps_the_fingerprint(dtype: torch.dtype) -> None:
    narrow = torch.nn.Linear(5, 3).to(dtype)
    wide = torch.nn.Linear(5, 3)
    wide.load_state_dict(narrow.state_dict())
    assert narrow.weight.dtype != wide.weight.dtype
    assert fingerprint(narrow) == fingerprint(wide) == fingerprint(wide.double())


def test_a_lossy_cast_changes_the_fingerprint() -> None:
    module = torch.nn.Linear(5, 3)
    before = fingerprint(module)
    assert fingerprint(module.bfloat16()) != before


def test_the_last_bit_of_one_weight_changes_the_fingerprint() -> None:
    module = torch.nn.Linear(5, 3)
    before = fingerprint(module)
    with torch.no_grad():
        module.weight[2, 4] = torch.nextafter(module.weight[2, 4], torch.tensor(9.0))
    assert fingerprint(module) != before


def test_shape_and_name_are_part_of_the_fingerprint() -> None:
    weight = torch.arange(6.0)

    def module(name: str, *shape: int) -> torch.nn.Module:
        holder = torch.nn.Module()
        holder.register_parameter(name, torch.nn.Parameter(weight.reshape(shape)))
        return holder

    assert len({fingerprint(module(*m)) for m in (("a", 6), ("a", 2, 3), ("a", 3, 2), ("b", 6))}) == 4


def test_freezing_keeps_the_fingerprint() -> None:
    backbone = small_dit()
    before = fingerprint(backbone)
    assert fingerprint(attach(backbone, LOOP).backbone) == before


def test_a_base_with_other_weights_is_refused(copy: Path) -> None:
    change_tensors(copy / BASE_WEIGHTS, lambda weights: weights["proj_out_2.bias"].add_(1e-6))
    refuse(copy, "is another model.*--base")


def test_an_overriding_base_with_other_weights_is_refused(copy: Path, tmp_path: Path) -> None:
    other = small_dit()
    torch.nn.init.ones_(other.proj_out_2.bias)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="is another model"):
        load_ilf(copy, base=tmp_path / "other")


def test_a_base_with_the_same_weights_and_other_heads_is_refused(copy: Path) -> None:
    change_json(copy / BASE_CONFIG, lambda c: c.update(num_attention_heads=8, attention_head_dim=8))
    refuse(copy, "another model")


def test_a_base_with_the_same_weights_and_another_size_is_refused(copy: Path) -> None:
    change_json(copy / BASE_CONFIG, lambda c: c.update(sample_size=16))
    refuse(copy, "another model")


def test_a_base_that_lacks_a_weight_is_refused(copy: Path) -> None:
    change_tensors(copy / BASE_WEIGHTS, lambda weights: weights.pop("proj_out_2.bias"))
    refuse(copy, "proj_out_2.bias|another model")


def test_a_base_with_fewer_blocks_is_refused(copy: Path) -> None:
    change_json(copy / BASE_CONFIG, lambda c: c.update(num_layers=3))
    refuse(copy, r"holds weights that its config.json has no place for: transformer_blocks\.3\.")


@pytest.mark.parametrize("kind", ["dit", "pixart"])
def test_a_kind_that_is_not_the_base_s_is_refused(
    kind: str, dit_checkpoint: Path, pixart_checkpoint: Path, tmp_path: Path
) -> None:
    source = pixart_checkpoint if kind == "dit" else dit_checkpoint
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    change_json(copy / "ilf.json", lambda facts: facts.update(kind=kind))
    refuse(copy, "cannot be loaded|another model")


# --- missing or damaged files


def test_a_folder_without_facts_is_not_a_checkpoint(tmp_path: Path) -> None:
    refuse(tmp_path, "not an ILF checkpoint: ilf.json is missing")


def test_missing_feedback_weights_are_refused(copy: Path) -> None:
    (copy / "ilf.safetensors").unlink()
    refuse(copy, "ilf.safetensors is missing")


@pytest.mark.parametrize("name", ["ilf.safetensors", BASE_WEIGHTS])
@pytest.mark.parametrize("keep", [0, 7, 100, -1], ids=["empty", "in the length", "in the header", "last byte gone"])
def test_truncated_weights_are_refused(name: str, keep: int, copy: Path) -> None:
    path = copy / name
    path.write_bytes(path.read_bytes()[:keep])
    refuse(copy, "damaged or cut short|cannot be loaded")


@pytest.mark.parametrize("name", [BASE_WEIGHTS, BASE_CONFIG])
def test_a_missing_file_of_the_base_is_refused(name: str, copy: Path) -> None:
    (copy / name).unlink()
    refuse(copy, f"{Path(name).name} is missing")


def test_a_pickled_base_is_never_read(copy: Path) -> None:
    torch.save(small_dit().state_dict(), copy / "transformer" / "diffusion_pytorch_model.bin")
    (copy / BASE_WEIGHTS).unlink()
    refuse(copy, "has no safetensors, and pickles are not read; run there once: python -c ")


def test_a_pickle_under_the_name_of_the_feedback_weights_is_refused(copy: Path) -> None:
    torch.save({"scales": torch.zeros(2)}, copy / "ilf.safetensors")
    refuse(copy, "damaged")


@pytest.mark.parametrize("config", ["{", "[]", '{"_class_name": 1, "_class_name": 2}'])
def test_a_config_of_the_base_that_is_no_strict_json_is_refused(config: str, copy: Path) -> None:
    (copy / BASE_CONFIG).write_text(config)
    refuse(copy, r"config\.json (is not readable JSON|holds list|gives '_class_name' twice)")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["scales", "block.ff.net.2.weight"])
def test_a_feedback_weight_that_is_not_finite_is_refused_by_name(name: str, value: float, copy: Path) -> None:
    change_tensors(copy / "ilf.safetensors", lambda weights: weights[name].view(-1)[-1].fill_(value))
    refuse(copy, f"NaN or infinity in {name}")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_of_the_base_that_is_not_finite_is_refused_by_name(value: float, copy: Path) -> None:
    change_tensors(copy / BASE_WEIGHTS, lambda weights: weights["proj_out_2.bias"][0].fill_(value))
    refuse(copy, "NaN or infinity in proj_out_2.bias")


def test_feedback_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    model = attach(small_dit(), LOOP)
    with torch.no_grad():
        model.feedback.scales[1] = float("nan")
    with pytest.raises(CheckpointError, match="NaN or infinity in scales"):
        save_ilf(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("scales"), r"scales is missing, expected \(2,\)"),
        (lambda weights: weights.update(scales=torch.ones(3)), r"scales is \(3,\), expected \(2,\)"),
        (lambda weights: weights.update(extra=torch.ones(1)), "extra is .* expected no such tensor"),
    ],
    ids=["missing", "other shape", "unknown"],
)
def test_feedback_weights_of_another_model_are_refused_by_name(change: Change, message: str, copy: Path) -> None:
    change_tensors(copy / "ilf.safetensors", change)
    refuse(copy, message)


# --- wrong facts


@pytest.mark.parametrize("text", ["", "{", "[]", "1", "\x00", '"facts"'], ids=repr)
def test_facts_that_are_not_a_json_object_are_refused(text: str, copy: Path) -> None:
    (copy / "ilf.json").write_text(text)
    refuse(copy, r"ilf\.json (is not readable JSON|holds)")


def test_facts_that_are_not_text_are_refused(copy: Path) -> None:
    (copy / "ilf.json").write_bytes(b"\xff\xfe\x00{")
    refuse(copy, r"ilf\.json is not UTF-8 text")


@pytest.mark.parametrize("schema", [3, 0, None, "1", 1.5, True])
def test_another_schema_is_refused(schema: object, copy: Path) -> None:
    change_json(copy / "ilf.json", lambda facts: facts.update(schema=schema))
    refuse(copy, f"schema {schema!r}, this version reads 1 and 2")


@pytest.mark.parametrize("field", ["kind", "loop", "base", "config", "training"])
def test_a_missing_field_is_refused_by_name(field: str, copy: Path) -> None:
    change_json(copy / "ilf.json", lambda facts: facts.pop(field))
    refuse(copy, f"ilf\\.json .*{field}")


@pytest.mark.parametrize("field", ["source", "sha256"])
def test_a_missing_field_of_the_base_is_refused_by_name(field: str, copy: Path) -> None:
    change_json(copy / "ilf.json", lambda facts: facts["base"].pop(field))
    refuse(copy, f"ilf\\.json .*{field}")


@pytest.mark.parametrize("loop", [None, 1, [], [1], [1, 2, 3], ["a", "b"], {}, [1, float("inf")]], ids=repr)
def test_a_loop_that_is_no_pair_of_numbers_is_refused(loop: object, copy: Path) -> None:
    change_json(copy / "ilf.json", lambda facts: facts.update(loop=loop))
    refuse(copy, r"ilf\.json .*(loop|Infinity)")


@pytest.mark.parametrize("loop", [[0, 4], [2, 1], [4, 4]], ids=str)
def test_a_loop_out_of_range_is_refused(loop: list[int], copy: Path) -> None:
    change_json(copy / "ilf.json", lambda facts: facts.update(loop=loop))
    refuse(copy, rf"ilf\.json: loop {loop[0]}:{loop[1]} does not fit a model of 4 blocks")


def test_a_loop_of_another_size_than_the_scales_is_refused(copy: Path) -> None:
    change_json(copy / "ilf.json", lambda facts: facts.update(loop=[1, 3]))
    refuse(copy, r"scales is \(2,\), expected \(3,\)")


def test_an_unknown_kind_is_refused_with_the_known_ones(copy: Path) -> None:
    change_json(copy / "ilf.json", lambda facts: facts.update(kind="flux"))
    refuse(copy, "'flux'; supported: dit, pixart", UnsupportedBackbone)


@pytest.mark.parametrize("source", ["nowhere", "/nowhere", "/no/where", "a/b/c"])
def test_a_base_that_lies_nowhere_is_refused(source: str, copy: Path) -> None:
    change_json(copy / "ilf.json", lambda facts: facts["base"].update(source=source))
    refuse(copy, f"base {source} is not a folder.*--base")


def test_a_base_of_the_hub_is_refused_offline(copy: Path) -> None:
    change_json(copy / "ilf.json", lambda facts: facts["base"].update(source="no-such-owner/no-such-model"))
    refuse(copy, "base no-such-owner/no-such-model is no folder here, .*hf download no-such-owner/no-such-model")


# --- a base to train on


@pytest.mark.parametrize("inside", ["", "transformer"], ids=["the model", "a pipeline that holds it"])
@pytest.mark.parametrize("make", [small_dit, lambda: small_pixart(sized=True)], ids=["dit", "pixart"])
def test_a_base_is_loaded_by_the_class_in_its_config(make: Callable[[], Any], inside: str, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / inside)
    loaded = load_backbone(str(tmp_path))
    assert type(loaded) is type(make())
    assert fingerprint(loaded) == fingerprint(make())


def test_a_base_without_an_adapter_is_refused(tmp_path: Path) -> None:
    small_dit().save_pretrained(tmp_path)
    change_json(tmp_path / "config.json", lambda config: config.update(_class_name="UNet2DModel"))
    with pytest.raises(UnsupportedBackbone, match="no adapter for UNet2DModel"):
        load_backbone(str(tmp_path))


@pytest.mark.parametrize("damage", [lambda p: p.unlink(), lambda p: p.write_text("{")], ids=["missing", "damaged"])
def test_a_base_without_a_readable_config_is_refused(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    small_dit().save_pretrained(tmp_path)
    damage(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json is (missing; give the folder|not readable JSON)"):
        load_backbone(str(tmp_path))


def test_a_base_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    small_dit().save_pretrained(tmp_path)
    change_tensors(tmp_path / "diffusion_pytorch_model.safetensors", lambda t: t["proj_out_1.bias"].fill_(float("inf")))
    with pytest.raises(CheckpointError, match=r"NaN or infinity in proj_out_1\.bias"):
        load_backbone(str(tmp_path))


def test_the_package_s_demo_and_folders_have_a_source_that_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert base_source("mine") == str(tmp_path / "mine")
    assert base_source("owner/name") == "owner/name"
    assert Path(base_source("demo"), "config.json").is_file()


def test_the_scheduler_lies_beside_the_base_or_in_its_pipeline(tmp_path: Path) -> None:
    DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    (tmp_path / "transformer").mkdir()
    for base in (tmp_path, tmp_path / "transformer"):
        assert base_scheduler(str(base))["_class_name"] == "DDIMScheduler"
    with pytest.raises(CheckpointError, match=r"base owner/name is no folder here, .*hf download owner/name"):
        base_scheduler("owner/name")
