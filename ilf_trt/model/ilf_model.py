"""The ILF model: a frozen backbone whose inner blocks can run a second time on their own feedback."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from ilf_trt.contract.spec import Loop
from ilf_trt.errors import InvalidRequest

from .backbone import Backbone, State
from .context import Context
from .feedback import Feedback


@dataclass(frozen=True, slots=True)
class FirstPass:
    """A latent at its own time, as the frozen part sees it: the tokens of every stream before and after the loop.

    `modulation` (R, K, M, D) is that of the loop's blocks at `time`, `grid` the patches of a column and of a row.
    """

    hidden: State
    features: State
    modulation: Tensor
    time: Tensor
    context: Context
    grid: tuple[int, int]


class ILFModel(nn.Module):
    """Called like its backbone, plus `t_post` and `feedback`; made by `attach`.

    `backbone` is the caller's own module, shared and frozen; `feedback` is all that trains. `trained_on` is the
    fingerprint of the base that `feedback` was trained on if that is another than `backbone`, else None.
    Source: arXiv 2501.13107, section 3.1.
    """

    def __init__(self, adapter: Backbone, loop: Loop, feedback: Feedback) -> None:
        super().__init__()
        self.adapter = adapter
        self.loop = loop
        self.backbone: nn.Module = adapter.model
        self.feedback = feedback
        self.trained_on: str | None = None

    @property
    def config(self) -> Any:
        """The backbone's own configuration."""
        return self.backbone.config

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        t_post: Tensor | float | None = None,
        feedback: bool = True,
        return_dict: bool = True,
        **conditions: Any,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """hidden_states (R, C, H, W) of any size, timestep and t_post scalar or (R,) -> sample (R, C_out, H, W).

        With `feedback` the loop runs twice and everything after it is conditioned on `t_post` (default: the timestep);
        without, this is the plain backbone and `t_post` is not used. Raises InvalidRequest for unknown arguments,
        and for a latent of other channels or of a size that its patches do not fill.
        """
        call = self.adapter.bind(args, conditions)
        patch, shape = self.adapter.patch, tuple(hidden_states.shape)
        if len(shape) != 4 or shape[1] != self.adapter.latent[0] or shape[2] % patch or shape[3] % patch:
            raise InvalidRequest(
                f"hidden_states are {shape}, expected (R, {self.adapter.latent[0]}, H, W), H and W multiples of {patch}"
            )
        time = _per_row(call["timestep"], hidden_states)
        later = time if t_post is None or not feedback else _per_row(t_post, hidden_states)
        context = self.adapter.context(call)
        first = self.first_pass(hidden_states, time, context)
        sample = self.second_pass(first, later) if feedback else self.finish(first.features, time, context, first.grid)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def first_pass(
        self, hidden_states: Tensor, time: Tensor, context: Context, *, residual: torch.dtype | None = None
    ) -> FirstPass:
        """Patch embedding, the blocks before the loop, and the loop, at `time` (R,); all of it is frozen.

        `residual` is the dtype of the sum that runs through the blocks; by default that of the embedding.
        """
        blocks, loop = list(self.adapter.blocks), self.loop
        state: State = (self.adapter.embed(hidden_states), *self.adapter.starts(context))
        if residual is not None:
            state = tuple(tokens.to(residual) for tokens in state)
        hidden = self._run(blocks[: loop.begin], state, time, context)
        inside = blocks[loop.begin : loop.end + 1]
        modulation = self.adapter.modulation(inside, time, context, len(hidden_states))
        features = self.adapter.run(inside, hidden, modulation, context)
        return FirstPass(hidden, features, modulation, time, context, self.adapter.grid_of(hidden_states.shape))

    def second_pass(self, first: FirstPass, t_post: Tensor, *, recompute: bool = False) -> Tensor:
        """F, the loop again on its feedback, and what follows, at `t_post` (R,) -> sample (R, C_out, H, W).

        `recompute` keeps no activations inside of a block for the backward pass: it runs the block again there.
        """
        context, inside = first.context, list(self.adapter.blocks)[self.loop.begin : self.loop.end + 1]
        feedback = self._run([self.feedback.block], first.features, first.time, context, recompute=recompute)
        modulation = first.modulation
        if t_post is not first.time:
            modulation = self.adapter.modulation(inside, t_post, context, len(t_post))
        features = self.adapter.run(
            inside,
            first.hidden,
            modulation,
            context,
            feedback=feedback,
            scales=self.feedback.scales,
            recompute=recompute,
        )
        return self.finish(features, t_post, context, first.grid, recompute=recompute)

    def finish(
        self, features: State, time: Tensor, context: Context, grid: tuple[int, int], *, recompute: bool = False
    ) -> Tensor:
        """The blocks after the loop and the head, at `time` (R,): features -> sample (R, C_out, H, W)."""
        after = list(self.adapter.blocks)[self.loop.end + 1 :]
        tokens, *_ = self._run(after, features, time, context, recompute=recompute)
        return self.adapter.head(tokens, self.adapter.head_modulation(time, context, len(time)), grid)

    def _run(
        self, blocks: list[nn.Module], state: State, time: Tensor, context: Context, *, recompute: bool = False
    ) -> State:
        if not blocks:
            return state
        modulation = self.adapter.modulation(blocks, time, context, len(time))
        return self.adapter.run(blocks, state, modulation, context, recompute=recompute)


def _per_row(time: Tensor | float, hidden_states: Tensor) -> Tensor:
    times = torch.as_tensor(time, device=hidden_states.device)
    return times.reshape(-1).expand(hidden_states.shape[0])
