"""The model beside diffusers' own forward, and beside the paper's five steps written with diffusers' own blocks."""

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel, Transformer2DModel
from torch import Tensor, nn

from ilf_trt import ILFModel, attach
from ilf_trt.contract.spec import Initialisation, Loop
from ilf_trt.errors import InvalidRequest, UnsupportedBackbone
from tests.conftest import BLOCKS, CLASSES, LOOP, TEXT_CHANNELS, TEXT_TOKENS, small_dit, small_pixart

Call = dict[str, Any]

ROWS = 3
TIME = 700
TIME_POST = 433
LOOPS = ((0, 0), (0, BLOCKS - 1), (0, 2), (1, BLOCKS - 1), (1, 2), (2, 2))
# Far from the trained sizes of a scale, so that a wrong index, order or sign moves the output well past rounding.
LARGE_SCALES = (0.9, -0.7, 0.5, -0.3)
# Measured 0, the same kernels in the same order; a few float32 units in the last place are left to other machines.
FLOAT32_ROUNDING = 1e-5
# bfloat16 keeps 8 bits, 4e-3 a product; measured 1e-2 over four blocks.
BFLOAT16_ROUNDING = 5e-2
# A change that matters is thousands of times larger than rounding.
VISIBLE = 1e-2

DIT_XL_PARAMETERS, DIT_XL_TRAINABLE = 749.8e6, 26.7e6
PIXART_PARAMETERS, PIXART_TRAINABLE = 611.3e6, 21.3e6
HALF_A_DIGIT = 0.05e6  # the paper gives one digit after the point, in millions


def latent(backbone: nn.Module, rows: int = ROWS) -> Tensor:
    config = cast(Any, backbone.config)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, config.in_channels, config.sample_size, config.sample_size, generator=generator)


def dit_call(time: Any = TIME) -> Call:
    return {"timestep": torch.full((ROWS,), time), "class_labels": torch.tensor([3, 0, CLASSES])}


def pixart_call(time: Any = TIME, *, sized: bool = True, mask: str = "keep") -> Call:
    generator = torch.Generator().manual_seed(2)
    call: Call = {
        "timestep": torch.full((ROWS,), time),
        "encoder_hidden_states": torch.randn(ROWS, TEXT_TOKENS, TEXT_CHANNELS, generator=generator),
    }
    if sized:
        call["added_cond_kwargs"] = {
            "resolution": torch.tensor([[128.0, 128.0], [64.0, 256.0], [512.0, 96.0]]),
            "aspect_ratio": torch.tensor([[1.0], [0.25], [5.3]]),
        }
    if mask == "keep":
        call["encoder_attention_mask"] = (torch.arange(TEXT_TOKENS) < torch.tensor([[7], [4], [1]])).long()
    elif mask == "bias":
        call["encoder_attention_mask"] = torch.randn(ROWS, 1, TEXT_TOKENS, generator=generator)
    return call


def pixart_case(*, sized: bool, mask: str) -> Any:
    name = f"pixart-{'sized' if sized else 'unsized'}-mask_{mask}"
    return pytest.param(lambda: small_pixart(sized=sized), pixart_call(sized=sized, mask=mask), id=name)


CASES = [
    pytest.param(small_dit, dit_call(), id="dit"),
    *(pixart_case(sized=sized, mask=mask) for sized in (True, False) for mask in ("none", "keep", "bias")),
]
TWO_BACKBONES = [CASES[0], CASES[2]]


def fed(backbone: nn.Module, loop: tuple[int, int] = LOOP) -> ILFModel:
    """An ILF model whose feedback block is not a copy of any block and whose scales are large and all different."""
    model = attach(backbone, loop)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.feedback.block.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        model.feedback.scales.copy_(torch.tensor(LARGE_SCALES[: model.loop.size]))
    return model


def relative(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    return float((got - wanted).abs().max() / wanted.abs().max())


def plain(backbone: nn.Module, x: Tensor, call: Call) -> Tensor:
    return cast(Tensor, cast(Any, backbone)(x, **call).sample)


# --- beside diffusers' own forward


@torch.no_grad()
@pytest.mark.parametrize("loop", LOOPS, ids=str)
@pytest.mark.parametrize(("make", "call"), CASES)
def test_zero_scales_equal_the_backbone(make: Callable[[], nn.Module], call: Call, loop: tuple[int, int]) -> None:
    backbone = make()
    x = latent(backbone)
    wanted = plain(backbone, x, call)
    model = attach(backbone, loop)
    assert not model.feedback.scales.any()
    assert relative(model(x, t_post=call["timestep"], **call).sample, wanted) < FLOAT32_ROUNDING


@torch.no_grad()
@pytest.mark.parametrize(("make", "call"), CASES)
def test_without_feedback_it_is_the_backbone_whatever_the_scales(make: Callable[[], nn.Module], call: Call) -> None:
    backbone = make()
    x = latent(backbone)
    model = fed(backbone)
    got = model(x, feedback=False, t_post=TIME_POST, **call).sample
    assert relative(got, plain(backbone, x, call)) < FLOAT32_ROUNDING


@torch.no_grad()
def test_a_single_block_backbone_can_be_its_own_loop() -> None:
    backbone = small_dit(num_layers=1)
    x = latent(backbone)
    got = attach(backbone, (0, 0))(x, **dit_call()).sample
    assert relative(got, plain(backbone, x, dit_call())) < FLOAT32_ROUNDING


@torch.no_grad()
def test_a_pixart_without_a_caption_projection_takes_text_of_its_own_width() -> None:
    backbone = small_pixart(sized=False, caption_channels=None)
    x, call = latent(backbone), pixart_call(sized=False)
    call["encoder_hidden_states"] = torch.randn(ROWS, TEXT_TOKENS, 72)
    got = attach(backbone, LOOP)(x, **call).sample
    assert relative(got, plain(backbone, x, call)) < FLOAT32_ROUNDING


@torch.no_grad()
@pytest.mark.parametrize("option", [{"norm_elementwise_affine": True}, {"activation_fn": "geglu"}, {"patch_size": 4}])
def test_other_dit_options_still_equal_the_backbone(option: dict[str, Any]) -> None:
    backbone = small_dit(**option)
    for parameter in backbone.parameters():
        parameter += 0.02 * torch.randn_like(parameter)
    x = latent(backbone)
    got = attach(backbone, LOOP)(x, **dit_call()).sample
    assert relative(got, plain(backbone, x, dit_call())) < FLOAT32_ROUNDING


@torch.no_grad()
@pytest.mark.parametrize(("make", "call"), CASES)
def test_a_bfloat16_backbone_stays_near_the_float32_one(make: Callable[[], nn.Module], call: Call) -> None:
    backbone = make()
    x = latent(backbone)
    wanted = plain(backbone, x, call)
    got = attach(backbone.to(torch.bfloat16), LOOP)(x.to(torch.bfloat16), **call).sample
    assert relative(got.float(), wanted) < BFLOAT16_ROUNDING


@torch.no_grad()
def test_dit_is_called_with_the_positions_of_diffusers() -> None:
    backbone = small_dit()
    x, call = latent(backbone), dit_call()
    wanted = backbone(x, call["timestep"], call["class_labels"]).sample
    got = attach(backbone, LOOP)(x, call["timestep"], call["class_labels"]).sample
    assert relative(got, wanted) < FLOAT32_ROUNDING


@torch.no_grad()
def test_pixart_is_called_with_the_positions_of_diffusers() -> None:
    backbone = small_pixart(sized=True)
    x, call = latent(backbone), pixart_call()
    values = (
        call["encoder_hidden_states"],
        call["timestep"],
        call["added_cond_kwargs"],
        None,
        None,
        call["encoder_attention_mask"],
    )
    assert relative(attach(backbone, LOOP)(x, *values).sample, backbone(x, *values).sample) < FLOAT32_ROUNDING


@torch.no_grad()
def test_return_dict_false_gives_a_tuple_of_the_sample() -> None:
    model = fed(small_dit())
    x = latent(model.backbone)
    output = model(x, return_dict=False, **dit_call())
    assert isinstance(output, tuple)
    assert len(output) == 1
    assert torch.equal(output[0], model(x, **dit_call()).sample)


@torch.no_grad()
@pytest.mark.parametrize("time", [TIME, float(TIME), torch.tensor(TIME), torch.tensor([TIME])], ids=repr)
def test_a_scalar_time_stands_for_every_row(time: Any) -> None:
    model = fed(small_dit())
    x, call = latent(model.backbone), dit_call()
    wanted = model(x, t_post=torch.full((ROWS,), TIME_POST), **call).sample
    call["timestep"] = time
    t_post = type(time)(TIME_POST) if not isinstance(time, Tensor) else torch.full_like(time, TIME_POST)
    assert torch.equal(model(x, t_post=t_post, **call).sample, wanted)


@torch.no_grad()
def test_rows_do_not_mix() -> None:
    model = fed(small_pixart(sized=True))
    x, call = latent(model.backbone), pixart_call()
    call["timestep"], t_post = torch.tensor([900, 20, 431]), torch.tensor([850.0, 3.5, 200.25])
    together = model(x, t_post=t_post, **call).sample
    alone = {name: value[1:2] for name, value in call.items() if isinstance(value, Tensor)}
    alone["added_cond_kwargs"] = {name: value[1:2] for name, value in call["added_cond_kwargs"].items()}
    assert relative(model(x[1:2], t_post=t_post[1:2], **alone).sample, together[1:2]) < FLOAT32_ROUNDING


# --- beside the paper's five steps


@torch.no_grad()
def head_of_diffusers(backbone: Any, tokens: Tensor, x: Tensor, call: Call) -> Tensor:
    """What diffusers' own forward makes of `tokens` after its last block."""
    hook = backbone.transformer_blocks[-1].register_forward_hook(lambda *_: tokens)
    try:
        return plain(backbone, x, call)
    finally:
        hook.remove()


@torch.no_grad()
def five_steps(model: ILFModel, x: Tensor, run: Callable[[nn.Module, Tensor, Tensor], Tensor], t: Tensor) -> Tensor:
    """Tokens after the last block; `run` is one of diffusers' own blocks at a time."""
    backbone = cast(Any, model.backbone)
    blocks, (b, e), t_post = (
        backbone.transformer_blocks,
        (model.loop.begin, model.loop.end),
        torch.full_like(t, TIME_POST),
    )
    f = backbone.pos_embed(x)
    for i in range(b):  # 1
        f = run(blocks[i], f, t)
    h = f
    for i in range(b, e + 1):  # 2
        f = run(blocks[i], f, t)
    f_feed = run(model.feedback.block, f, t)  # 3
    f = h
    for i in range(b, e + 1):  # 4
        f = run(blocks[i], f_feed * LARGE_SCALES[i - b] + f, t_post)
    for i in range(e + 1, len(blocks)):  # 5
        f = run(blocks[i], f, t_post)
    return cast(Tensor, f)


@torch.no_grad()
@pytest.mark.parametrize("loop", LOOPS, ids=str)
def test_dit_follows_the_five_steps_of_the_paper(loop: tuple[int, int]) -> None:
    model = fed(small_dit(), loop)
    x, call = latent(model.backbone), dit_call()

    def run(block: nn.Module, tokens: Tensor, time: Tensor) -> Tensor:
        return cast(Tensor, block(tokens, timestep=time, class_labels=call["class_labels"]))

    tokens = five_steps(model, x, run, call["timestep"])
    wanted = head_of_diffusers(model.backbone, tokens, x, dit_call(TIME_POST))
    assert relative(model(x, t_post=TIME_POST, **call).sample, wanted) < FLOAT32_ROUNDING


@torch.no_grad()
@pytest.mark.parametrize("loop", LOOPS, ids=str)
@pytest.mark.parametrize("sized", [True, False], ids=["sized", "unsized"])
def test_pixart_follows_the_five_steps_of_the_paper(loop: tuple[int, int], sized: bool) -> None:
    model = fed(small_pixart(sized=sized), loop)
    backbone = cast(Any, model.backbone)
    x, call = latent(backbone), pixart_call(sized=sized)
    text = backbone.caption_projection(call["encoder_hidden_states"])
    bias = (1 - call["encoder_attention_mask"].float()).unsqueeze(1) * -10000.0

    def run(block: nn.Module, tokens: Tensor, time: Tensor) -> Tensor:
        row, _ = backbone.adaln_single(time, call.get("added_cond_kwargs"), batch_size=ROWS, hidden_dtype=torch.float32)
        return cast(Tensor, block(tokens, encoder_hidden_states=text, encoder_attention_mask=bias, timestep=row))

    tokens = five_steps(model, x, run, call["timestep"])
    wanted = head_of_diffusers(backbone, tokens, x, {**call, "timestep": torch.full((ROWS,), TIME_POST)})
    assert relative(model(x, t_post=TIME_POST, **call).sample, wanted) < FLOAT32_ROUNDING


@torch.no_grad()
@pytest.mark.parametrize(("make", "call"), TWO_BACKBONES)
def test_nonzero_scales_change_the_output(make: Callable[[], nn.Module], call: Call) -> None:
    backbone = make()
    x = latent(backbone)
    assert relative(fed(backbone)(x, **call).sample, plain(backbone, x, call)) > VISIBLE


@torch.no_grad()
@pytest.mark.parametrize("index", range(2))
def test_every_single_scale_changes_the_output(index: int) -> None:
    model = attach(small_dit(), LOOP)
    x = latent(model.backbone)
    before = model(x, **dit_call()).sample
    model.feedback.scales[index] = LARGE_SCALES[index]
    assert relative(model(x, **dit_call()).sample, before) > VISIBLE


def attention_inputs(model: ILFModel, x: Tensor, call: Call, **options: Any) -> list[tuple[str, Tensor]]:
    """The input of every block's self-attention with the block's name, in the order of the runs."""
    seen: list[tuple[str, Tensor]] = []
    named = {str(i): block for i, block in enumerate(cast(Any, model.backbone).transformer_blocks)}
    hooks = [
        cast(Any, block).attn1.to_q.register_forward_hook(
            lambda _, inputs, __, name=name: seen.append((name, inputs[0].clone()))
        )
        for name, block in (named | {"F": model.feedback.block}).items()
    ]
    model(x, **call, **options)
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
@pytest.mark.parametrize(("make", "call"), TWO_BACKBONES)
def test_a_feedback_step_runs_the_blocks_in_the_order_of_the_paper(make: Callable[[], nn.Module], call: Call) -> None:
    model = fed(make())
    x = latent(model.backbone)
    assert [name for name, _ in attention_inputs(model, x, call)] == ["0", "1", "2", "F", "1", "2", "3"]


@torch.no_grad()
def test_a_step_without_feedback_runs_every_block_once() -> None:
    model = fed(small_dit())
    runs = attention_inputs(model, latent(model.backbone), dit_call(), feedback=False)
    assert [name for name, _ in runs] == ["0", "1", "2", "3"]


@torch.no_grad()
@pytest.mark.parametrize(("make", "call"), TWO_BACKBONES)
def test_t_post_acts_only_after_the_first_pass(make: Callable[[], nn.Module], call: Call) -> None:
    model = fed(make())
    x = latent(model.backbone)
    at_t = attention_inputs(model, x, call, t_post=TIME)
    later = attention_inputs(model, x, call, t_post=TIME_POST)
    same = [torch.equal(a, b) for (_, a), (_, b) in zip(at_t, later, strict=True)]
    assert same == [True] * 4 + [False] * 3


@torch.no_grad()
def test_t_post_defaults_to_the_timestep() -> None:
    model = fed(small_dit())
    x = latent(model.backbone)
    assert torch.equal(model(x, **dit_call()).sample, model(x, t_post=TIME, **dit_call()).sample)


# --- what trains


def parameters(module: nn.Module, *, trainable: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


@pytest.mark.parametrize(("make", "call"), TWO_BACKBONES)
def test_one_block_and_a_scale_for_each_loop_block_train(make: Callable[[], nn.Module], call: Call) -> None:
    model = attach(make(), LOOP)
    one_block = parameters(cast(Any, model.backbone).transformer_blocks[LOOP[1]])
    assert parameters(model, trainable=True) == one_block + 2
    assert {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"feedback"}
    assert model.feedback.scales.shape == (2,)


def test_dit_xl_has_the_parameters_of_the_paper() -> None:
    with torch.device("meta"):
        model = attach(DiTTransformer2DModel(), (8, 19))
    assert len(model.adapter.blocks) == 28
    assert parameters(model.backbone) == pytest.approx(DIT_XL_PARAMETERS, abs=HALF_A_DIGIT)
    assert parameters(model, trainable=True) == pytest.approx(DIT_XL_TRAINABLE, abs=HALF_A_DIGIT)
    assert model.feedback.scales.shape == (12,)


def test_pixart_has_the_parameters_of_the_paper() -> None:
    with torch.device("meta"):
        model = attach(PixArtTransformer2DModel(cross_attention_dim=1152, caption_channels=4096), (8, 19))
    assert len(model.adapter.blocks) == 28
    assert parameters(model.backbone) == pytest.approx(PIXART_PARAMETERS, abs=HALF_A_DIGIT)
    assert parameters(model, trainable=True) == pytest.approx(PIXART_TRAINABLE, abs=HALF_A_DIGIT)


@pytest.mark.parametrize(("make", "call"), TWO_BACKBONES)
def test_the_gradient_reaches_every_feedback_weight_and_nothing_else(make: Callable[[], nn.Module], call: Call) -> None:
    model = fed(make())
    model(latent(model.backbone), t_post=TIME_POST, **call).sample.square().mean().backward()
    for name, parameter in model.named_parameters():
        if name.startswith("feedback."):
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any() or name.endswith("to_k.bias"), name  # softmax cancels a key's bias
        else:
            assert parameter.grad is None, name


def test_the_scales_get_a_gradient_from_zero() -> None:
    model = attach(small_dit(), LOOP)
    model(latent(model.backbone), **dit_call()).sample.square().mean().backward()
    assert model.feedback.scales.grad is not None
    assert model.feedback.scales.grad.all()


# --- surgery


@pytest.mark.parametrize(("make", "call"), TWO_BACKBONES)
def test_attach_shares_the_tensors_of_the_backbone(make: Callable[[], nn.Module], call: Call) -> None:
    backbone = make()
    before = {name: p.data_ptr() for name, p in backbone.named_parameters()}
    model = attach(backbone, LOOP)
    assert model.backbone is backbone
    assert {name: p.data_ptr() for name, p in model.backbone.named_parameters()} == before


@pytest.mark.parametrize(("initialisation", "index"), [(None, 2), ("end", 2), (Initialisation.BEGIN, 1)])
@pytest.mark.parametrize("make", [small_dit, lambda: small_pixart(sized=True)], ids=["dit", "pixart"])
def test_the_feedback_block_starts_as_a_copy(make: Callable[[], Any], initialisation: Any, index: int) -> None:
    model = attach(make(), LOOP, **({} if initialisation is None else {"initialisation": initialisation}))
    copied = model.adapter.blocks[index].state_dict()
    assert all(torch.equal(value, copied[name]) for name, value in model.feedback.block.state_dict().items())


@pytest.mark.parametrize(
    ("make", "call"),
    [(small_dit, dit_call()), (lambda: small_pixart(sized=True), pixart_call())],
    ids=["dit", "pixart"],
)
@torch.no_grad()
def test_a_feedback_block_from_zero_passes_its_input_on_and_can_learn(make: Callable[[], Any], call: Call) -> None:
    model = attach(make(), LOOP, initialisation="zero")
    context = model.adapter.context(call)
    first = model.first_pass(latent(model.backbone), call["timestep"], context)
    rows = model.adapter.modulation([model.feedback.block], call["timestep"], context, ROWS)
    passed_on = model.adapter.run([model.feedback.block], first.features, rows, context)
    assert all(map(torch.equal, passed_on, first.features))
    assert all(parameter.requires_grad for parameter in model.feedback.parameters())
    assert any(parameter.any() for parameter in model.adapter.blocks[2].ff.net[-1].parameters())  # type: ignore[union-attr]


def test_an_unknown_start_of_the_feedback_block_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="initialisation is 'middle', it must be one of end, begin, zero"):
        attach(small_dit(), LOOP, initialisation="middle")


def test_attach_freezes_the_backbone_and_leaves_its_values() -> None:
    backbone = small_dit().train()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    model = attach(backbone, LOOP)
    assert not any(p.requires_grad for p in backbone.parameters())
    assert not backbone.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.backbone.state_dict().items())


def test_the_feedback_block_is_a_copy_of_the_last_loop_block() -> None:
    model = attach(small_dit(), LOOP)
    last = cast(Any, model.backbone).transformer_blocks[LOOP[1]]
    for (name, copy), original in zip(model.feedback.block.named_parameters(), last.parameters(), strict=True):
        assert torch.equal(copy, original), name
        assert copy.data_ptr() != original.data_ptr(), name


def test_two_models_on_one_backbone_do_not_share_feedback() -> None:
    backbone = small_dit()
    first, second = attach(backbone, LOOP), attach(backbone, LOOP)
    with torch.no_grad():
        first.feedback.scales.fill_(1)
    assert not second.feedback.scales.any()
    assert first.backbone is second.backbone


def test_a_loop_object_is_as_good_as_a_pair() -> None:
    assert attach(small_dit(), Loop(1, 2)).loop == attach(small_dit(), (1, 2)).loop == Loop(1, 2)


def test_a_subclass_of_a_known_backbone_is_known() -> None:
    class Mine(DiTTransformer2DModel):
        pass

    backbone = small_dit()
    backbone.__class__ = Mine
    assert attach(backbone, LOOP).adapter.kind == "dit"


@pytest.mark.parametrize("wrong", [nn.Linear(2, 2), nn.Identity(), "a string", None], ids=repr)
def test_another_class_is_refused_with_the_supported_ones(wrong: Any) -> None:
    with pytest.raises(UnsupportedBackbone, match="DiTTransformer2DModel, PixArtTransformer2DModel"):
        attach(wrong, LOOP)


def test_another_diffusers_transformer_is_refused_by_name() -> None:
    with torch.device("meta"):
        other = Transformer2DModel(num_attention_heads=1, attention_head_dim=8, in_channels=32, num_layers=1)
    with pytest.raises(UnsupportedBackbone, match="Transformer2DModel"):
        attach(other, (0, 0))


@pytest.mark.parametrize("loop", [(2, 1), (0, BLOCKS), (BLOCKS, BLOCKS), (-1, 1), (-2, -1)], ids=str)
def test_a_loop_out_of_range_is_refused_before_the_backbone_is_touched(loop: tuple[int, int]) -> None:
    backbone = small_dit().train()
    with pytest.raises(InvalidRequest, match=f"{loop[0]}:{loop[1]}.*{BLOCKS} blocks"):
        attach(backbone, loop)
    assert backbone.training
    assert all(p.requires_grad for p in backbone.parameters())


@pytest.mark.parametrize(
    "make", [lambda: small_dit(dropout=0.1), lambda: small_pixart(sized=False, dropout=0.1)], ids=["dit", "pixart"]
)
def test_dropout_is_refused(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(UnsupportedBackbone, match=r"dropout 0\.1"):
        attach(make(), LOOP)


# --- refusals of a call


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(ROWS)}, "'labels' is not an argument of DiT"),
        ({"encoder_hidden_states": torch.zeros(ROWS, 1, 1)}, "'encoder_hidden_states' is not an argument of DiT"),
        ({"class_labels": None}, "class_labels"),
        ({"timestep": None}, "timestep"),
        ({"cross_attention_kwargs": {"scale": 0.5}}, "'cross_attention_kwargs' is not supported"),
    ],
    ids=["unknown", "of another model", "no labels", "no timestep", "unsupported"],
)
def test_a_wrong_argument_of_dit_is_refused_by_name(change: Call, message: str) -> None:
    model = attach(small_dit(), LOOP)
    with pytest.raises(InvalidRequest, match=message):
        model(latent(model.backbone), **{**dit_call(), **change})


@pytest.mark.parametrize("missing", ["timestep", "class_labels"])
def test_a_missing_argument_of_dit_is_refused_by_name(missing: str) -> None:
    model = attach(small_dit(), LOOP)
    with pytest.raises(InvalidRequest, match=missing):
        model(latent(model.backbone), **{name: value for name, value in dit_call().items() if name != missing})


@pytest.mark.parametrize("missing", ["timestep", "encoder_hidden_states", "added_cond_kwargs"])
def test_a_missing_argument_of_pixart_is_refused_by_name(missing: str) -> None:
    model = attach(small_pixart(sized=True), LOOP)
    with pytest.raises(InvalidRequest, match=missing):
        model(latent(model.backbone), **{name: value for name, value in pixart_call().items() if name != missing})


def test_a_self_attention_mask_is_refused_by_name() -> None:
    model = attach(small_pixart(sized=True), LOOP)
    with pytest.raises(InvalidRequest, match="'attention_mask' is not supported"):
        model(latent(model.backbone), attention_mask=torch.ones(ROWS, 64), **pixart_call())


def test_an_argument_given_twice_is_refused_by_name() -> None:
    model = attach(small_dit(), LOOP)
    with pytest.raises(InvalidRequest, match="'timestep' is given twice"):
        model(latent(model.backbone), TIME, **dit_call())


def test_too_many_positional_arguments_are_refused() -> None:
    model = attach(small_dit(), LOOP)
    with pytest.raises(InvalidRequest, match="DiTTransformer2DModel takes"):
        model(latent(model.backbone), TIME, torch.zeros(ROWS, dtype=torch.int64), None, None)


@torch.no_grad()
@pytest.mark.parametrize("side", [(32, 8), (8, 32), (2, 2), (32, 32), (17, 17)], ids=str)
def test_a_latent_of_another_size_is_refused_or_answered_as_diffusers_does(side: tuple[int, int]) -> None:
    backbone = small_pixart(sized=False)  # made for 16 x 16; 32 x 8 has as many tokens, 2 x 2 a single one
    x, call = torch.randn(ROWS, 4, *side), pixart_call(sized=False)
    wanted = plain(backbone, x, call)
    try:
        got = attach(backbone, LOOP)(x, **call).sample
    except (InvalidRequest, RuntimeError):
        return
    assert got.shape == wanted.shape
    assert relative(got, wanted) < FLOAT32_ROUNDING
