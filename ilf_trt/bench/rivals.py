"""The rivals in PyTorch: plain diffusers, compiled, with the paper's cache, and with a caching library."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ilf_trt import ILFModel
from ilf_trt.contract.plan import StepPlan
from ilf_trt.errors import MissingDependency
from ilf_trt.model.sampling import CompileOptions, inference_copy, move_to, sample

CACHED, OF_BLOCKS, CACHED_EVERY = 18, 28, 3  # the paper's middle 18 of 28 (arXiv 2501.13107, section 4.2)

Run = Callable[[Mapping[str, Tensor], Tensor], Tensor]


class CachedBlocks(nn.Module):
    """Consecutive blocks that run on every `every`-th step of a trajectory of `steps`.

    On all other steps, the last change that the blocks made is added to the new input. The paper stores the change of
    every attention and feed-forward; this class stores their sum, which gives the same result with one addition.
    """

    def __init__(self, blocks: Sequence[nn.Module], *, every: int, steps: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self._every, self._steps = every, steps
        self._step = 0
        self._added: Tensor | None = None

    def forward(self, tokens: Tensor, *conditions: Any, **more: Any) -> Tensor:
        """tokens (R, N, D) -> (R, N, D)."""
        step, self._step = self._step, (self._step + 1) % self._steps
        if self._added is not None and step % self._every:
            return tokens + self._added
        output = tokens
        for block in self.blocks:
            output = block(output, *conditions, **more)
        self._added = output - tokens
        return output


def cached_blocks(blocks: int) -> int:
    """The number of middle blocks that the paper's cache covers."""
    return blocks * CACHED // OF_BLOCKS


class Eager:
    """The rivals of one model in torch on one device; each `with` block has its own copy of the model."""

    def __init__(
        self,
        model: ILFModel,
        scheduler: Mapping[str, Any],
        guidance_scale: float,
        device: str,
        dtype: torch.dtype,
        *,
        guidance: bool = True,
    ) -> None:
        self._model = model
        self._scheduler = scheduler
        self._guidance_scale = guidance_scale
        self._guidance = guidance
        self._device = device
        self._dtype = dtype

    @contextmanager
    def plain(self, plan: StepPlan, *, compiled: CompileOptions | None = None) -> Iterator[Run]:
        """diffusers' own model and its own forward."""
        with self._copy(self._model.backbone, compiled) as copy:
            yield self._run(copy, plan)

    @contextmanager
    def ilf(self, plan: StepPlan, *, compiled: CompileOptions | None = None) -> Iterator[Run]:
        """The ILF model."""
        with self._copy(self._model, compiled) as copy:
            yield self._run(copy, plan)

    @contextmanager
    def cached(self, plan: StepPlan) -> Iterator[Run]:
        """diffusers' model with the paper's cache around its middle blocks."""
        with self._copy(self._model.backbone) as copy:
            path = self._model.adapter.block_path
            blocks = list(copy.get_submodule(path).children())
            begin = (len(blocks) - cached_blocks(len(blocks))) // 2
            end = begin + cached_blocks(len(blocks))
            middle = CachedBlocks(blocks[begin:end], every=CACHED_EVERY, steps=len(plan.steps))
            copy.set_submodule(path, nn.ModuleList([*blocks[:begin], middle, *blocks[end:]]))
            yield self._run(copy, plan)

    @contextmanager
    def cache_dit(self, plan: StepPlan) -> Iterator[tuple[Run, Callable[[], int]]]:
        """diffusers' model under cache-dit, and a call that gives the block forwards of the last run.

        All options have cache-dit's defaults, except the steps: they follow its `medium` schedule. The default schedule
        watches how much the features change, which means nothing with random weights. Raises MissingDependency without
        the package, and the package's errors.
        """
        try:
            library = import_module("cache_dit")
        except ImportError as error:
            raise MissingDependency(f"cache-dit cannot be imported ({error}); pip install cache-dit") from error
        with self._copy(self._model.backbone) as copy:
            block_forwards = 0

            def count(*_: Any) -> None:
                nonlocal block_forwards
                block_forwards += 1

            for block in copy.get_submodule(self._model.adapter.block_path).children():
                block.register_forward_hook(count)
            steps = len(plan.steps)
            config = library.DBCacheConfig(
                num_inference_steps=steps,
                steps_computation_mask=library.steps_mask(total_steps=steps, mask_policy="medium"),
                steps_computation_policy="static",
            )
            library.enable_cache(copy, cache_config=config)
            inner = self._run(copy, plan)

            def run(conditions: Mapping[str, Tensor], noise: Tensor) -> Tensor:
                nonlocal block_forwards
                block_forwards = 0
                library.refresh_context(copy, num_inference_steps=steps)
                return inner(conditions, noise)

            try:
                yield run, lambda: block_forwards
            finally:
                with suppress(Exception):  # the copy is dropped anyway, and the measurement is over
                    library.disable_cache(copy)

    def reference(self, plan: StepPlan, conditions: Mapping[str, Tensor], noise: Tensor) -> Tensor:
        """The reference for every row of `plan`: the latents in whole float32, on the host."""
        with move_to(self._model, self._device):
            return self._run(self._model, plan)(conditions, noise).cpu()

    @contextmanager
    def _copy(self, model: nn.Module, compiled: CompileOptions | None = None) -> Iterator[nn.Module]:
        copy = inference_copy(model, device=self._device, dtype=self._dtype, compiled=compiled)
        try:
            yield copy
        finally:
            if compiled is not None:
                del copy
                torch.compiler.reset()  # its graphs hold memory of the GPU

    def _run(self, model: nn.Module, plan: StepPlan) -> Run:
        options: dict[str, Any] = {"guidance_scale": self._guidance_scale, "guidance": self._guidance}

        def run(conditions: Mapping[str, Tensor], noise: Tensor) -> Tensor:
            return sample(model, plan, self._scheduler, conditions, noise, **options)

        return run
