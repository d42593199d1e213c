"""The command `build`: a checkpoint becomes a bundle."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from rich.console import Console

from ilf_trt.assembly.conductor import build as build_bundle
from ilf_trt.assembly.options import DEFAULT_BATCH, BuildOptions
from ilf_trt.contract.plan import (
    DEFAULT_FEEDBACK,
    Ratio,
    Rule,
)
from ilf_trt.contract.spec import BatchRange, Calibrator, Precision
from ilf_trt.errors import InvalidRequest

from .build_view import print_build
from .flags import EngineFlags, MaxError, PipelineFlags, RatioName
from .numbers import OptionalReal, OptionalWhole, Whole
from .progress_bar import progress_bar

MIB = 1 << 20


def build(
    *,
    checkpoint: str,
    output: Annotated[Path, Parameter(alias="-o")],
    base: str | None = None,
    base_differs: Annotated[bool, Parameter(negative=())] = False,
    precision: Precision = Precision.FP32,
    residual: Literal["fp32"] | None = None,
    batch: str = str(DEFAULT_BATCH),
    steps: Whole = 10,
    feedback: str = DEFAULT_FEEDBACK,
    rule: Rule = Rule.ANNEAL,
    ratio: RatioName = "m/n",
    scheduler: str | None = None,
    guidance: bool = True,
    guidance_scale: OptionalReal = None,
    clean_captions: bool | None = None,
    text_tokens: OptionalWhole = None,
    pipeline: PipelineFlags = PipelineFlags(),  # noqa: B008
    hoist_text: Annotated[bool, Parameter(negative=())] = False,
    calibration: Path | None = None,
    calibrator: Calibrator = Calibrator.AUTO,
    fp8_exclude: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    fp8_attention: bool | None = None,
    device: str = "cpu",
    verify: bool = True,
    max_error: MaxError = None,
    engines: EngineFlags = EngineFlags(),  # noqa: B008
    force: bool = False,
) -> None:
    """Build a bundle from an ILF checkpoint: export the graphs, verify them, build engines, put it all in place.

    Example: `ilf-trt build --checkpoint demo --output build/demo.ilf`

    Parameters
    ----------
    checkpoint
        Folder of an ILF checkpoint, or `demo`.
    output
        Folder of the bundle to write.
    base
        Folder or hub id of the frozen backbone, when it is not where the checkpoint says.
    base_differs
        Take a base of the same architecture that the feedback block was not trained on: a fine-tune, or a fused LoRA.
        The manifest records it.
    precision
        What the matrix products run in.
    residual
        fp32 keeps the sum that runs through the blocks in float32, for models whose activations pass float16's 65504.
    batch
        Pictures a run may have: N, or MIN:OPT:MAX.
    steps
        Solver steps of the bundle's plan; it can be replaced at run time.
    feedback
        Steps that get feedback: all, none, alternate, first:K, last:K, outer:K, inner:K or numbers 0,1,8,9.
    rule
        Where the network is conditioned after feedback.
    ratio
        Weight of the loop's size in the rule.
    scheduler
        dpmsolver++, ddim, euler, or a diffusers scheduler_config.json; by default the checkpoint's own.
    guidance
        Build for classifier-free guidance (the blocks see every picture twice).
    guidance_scale
        Default strength of guidance; it can be replaced at run time. By default what the diffusers pipeline of the
        model takes: 4.5 for PixArt, 4 for DiT, 1.5 for pixels.
    clean_captions
        Whether prompts are cleaned of links, tags and the like if a request does not say; by default as the diffusers
        pipeline of the model does.
    text_tokens
        Length of the text that the graphs take; by default the pipeline's (PixArt-alpha 120, Sigma 300), or 300.
    hoist_text
        Make the text's keys and values once a picture instead of in every block (PixArt).
    calibration
        What FP8's scales come from: an .npz with conditions of some pictures (text, text_mask … or class_labels), or an
        FP8 bundle whose scales shall stay; a model of classes needs none.
    calibrator
        What measures for FP8: auto takes Model Optimizer if it is installed.
    fp8_exclude
        Linears and attentions that shall stay in FP16, by shell pattern: transformer_blocks.0.*, *.to_out.0 or *.attn2;
        may be repeated.
    fp8_attention
        Whether attention runs in FP8 too; by default in fp8 bundles of models with 64 or more image tokens.
    device
        Where PyTorch runs the reference and the calibration: cpu, cuda or cuda:1.
    verify
        Hold every graph and one trajectory against the torch reference before the bundle is put in place, and keep
        that reference in it, so that `ilf-trt verify` can do the same on the machine that serves.
    max_error
        Largest relative difference to accept; by default 1e-4 for fp32, 2e-2 for fp16, 1e-1 for bf16, 2e-1 for fp8.
    force
        Replace an existing bundle.
    """
    if text_tokens is not None and text_tokens < 1:
        raise InvalidRequest(f"text_tokens is {text_tokens}, it must be at least 1")
    options = BuildOptions(
        base=base,
        base_differs=base_differs,
        precision=precision,
        wide_residual=residual == "fp32",
        batch=BatchRange.parse(batch),
        guidance=guidance,
        guidance_scale=guidance_scale,
        clean_captions=clean_captions,
        steps=steps,
        feedback=feedback,
        rule=rule,
        ratio=Ratio(ratio),
        scheduler=scheduler,
        text_tokens=text_tokens,
        **pipeline.options(),
        hoist_text=hoist_text,
        calibration=calibration,
        calibrator=calibrator,
        fp8_exclude=fp8_exclude,
        fp8_attention=fp8_attention,
        device=device,
        verify=verify,
        max_error=max_error,
        engines=engines.options(),
        strip_graphs=engines.strip_graphs,
        cache=engines.cache_folder(),
    )
    with progress_bar() as progress:
        result = build_bundle(checkpoint, output, options, force=force, progress=progress)
    print_build(result, Console())
