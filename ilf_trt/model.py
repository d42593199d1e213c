"""The ILF model: a frozen backbone whose inner blocks can run a second time on their own feedback."""

from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from ilf_trt.backbone import Backbone, Context
from ilf_trt.contract import Loop
from ilf_trt.errors import InvalidRequest
from ilf_trt.feedback import Feedback


class ILFModel(nn.Module):
    """Called like its backbone, plus `t_post` and `feedback`; made by `attach`.

    `backbone` is the caller's own module, shared and frozen; `feedback` is all that trains.
    Source: arXiv 2501.13107, section 3.1.
    """

    def __init__(self, adapter: Backbone, loop: Loop, feedback: Feedback) -> None:
        super().__init__()
        self.adapter = adapter
        self.loop = loop
        self.backbone: nn.Module = adapter.model
        self.feedback = feedback

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
        """hidden_states (R, C, H, W), timestep and t_post scalar or (R,) -> sample (R, C_out, H, W).

        With `feedback` the loop runs twice and everything after it is conditioned on `t_post` (default: the timestep);
        without, this is the plain backbone and `t_post` is not used. Raises InvalidRequest for unknown arguments,
        and for a latent of another size than the model was made for.
        """
        call = self.adapter.bind(args, conditions)
        if tuple(hidden_states.shape[1:]) != self.adapter.latent:
            raise InvalidRequest(
                f"hidden_states are {tuple(hidden_states.shape)}, expected (R, *{self.adapter.latent})"
            )
        batch = hidden_states.shape[0]
        time = _per_row(call["timestep"], hidden_states)
        later = time if t_post is None or not feedback else _per_row(t_post, hidden_states)
        context = self.adapter.context(call)
        blocks = list(self.adapter.blocks)
        before, inside, after = (
            blocks[: self.loop.begin],
            blocks[self.loop.begin : self.loop.end + 1],
            blocks[self.loop.end + 1 :],
        )

        tokens = self._run(before, self.adapter.embed(hidden_states), time, context)
        features = self._run(inside, tokens, time, context)
        if feedback:
            fed_back = self._run([self.feedback.block], features, time, context)
            rows = self.adapter.rows(inside, later, context, batch)
            features = self.adapter.run(inside, tokens, rows, context, feedback=fed_back, scales=self.feedback.scales)
        features = self._run(after, features, later, context)
        sample = self.adapter.head(features, self.adapter.head_row(later, context, batch))
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _run(self, blocks: list[nn.Module], tokens: Tensor, time: Tensor, context: Context) -> Tensor:
        if not blocks:
            return tokens
        return self.adapter.run(blocks, tokens, self.adapter.rows(blocks, time, context, tokens.shape[0]), context)


def _per_row(time: Tensor | float, hidden_states: Tensor) -> Tensor:
    times = torch.as_tensor(time, device=hidden_states.device)
    return times.reshape(-1).expand(hidden_states.shape[0])
