"""diffusers' own forward as one graph in ONNX Runtime: what an export without this package gives."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ilf_trt import leaves
from ilf_trt.contract.guidance import OFF, effective_scale
from ilf_trt.contract.plan import StepPlan
from ilf_trt.errors import InvalidRequest
from ilf_trt.model.foreign import quieted
from ilf_trt.model.ilf_model import ILFModel
from ilf_trt.model.sampling import check_finite

from .rivals import Run
from .row import Rival

OPSET = 20
EXPORTERS = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")


class Plain(nn.Module):
    """A diffusers model of classes with tensors for arguments, as the exporter wants it."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, latent: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        """latent (R, C, H, W), times (R,), labels (R,) -> (R, C', H, W)."""
        output: Tensor = self.backbone(latent, timestep=times, class_labels=labels).sample
        return output


class DiffusersGraph:
    """The graph, and the loop over the steps with guidance and the solver in numpy."""

    @staticmethod
    @contextmanager
    def opened(
        model: ILFModel,
        plan: StepPlan,
        guidance_scale: float,
        *,
        guidance: bool = True,
        threads: int = 0,
        device: str = "cpu",
    ) -> Iterator[Run]:
        """A run of `plan` on the CPU, the only `device`.

        Without `guidance`, and for a scale of 1 and below, every picture runs once instead of twice. With `threads` 0,
        ONNX Runtime chooses the number of threads. Raises InvalidRequest for another device and for a model
        that takes more than a class label, and MissingDependency without ONNX Runtime.
        """
        if device != "cpu":
            raise InvalidRequest(f"{Rival.ONNX} is measured on a CPU only; leave it out of --against")
        onnxruntime = leaves.import_onnxruntime()
        conditioning = model.adapter.conditioning(1)
        if conditioning.classes is None:
            raise InvalidRequest("diffusers' own graph is measured for models of classes only")
        scale = effective_scale(guidance_scale)
        guided = guidance and scale > OFF
        channels, height, width = model.adapter.latent
        with TemporaryDirectory() as folder:
            path = Path(folder) / "diffusers.onnx"
            batch = torch.export.Dim("R", min=2, max=256)
            example = (torch.zeros(4, channels, height, width), torch.zeros(4), torch.zeros(4, dtype=torch.int64))
            with quieted(EXPORTERS, logging.ERROR), torch.no_grad():
                program: Any = torch.onnx.export(
                    Plain(model.backbone).eval(),
                    example,
                    dynamo=True,
                    opset_version=OPSET,
                    input_names=["latent", "times", "labels"],
                    dynamic_shapes=({0: batch}, {0: batch}, {0: batch}),
                    verbose=False,
                )
            program.save(path)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            options.add_session_config_entry("session.force_spinning_stop", "1")
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            null = conditioning.null

            def run(conditions: Mapping[str, Tensor], noise: Tensor) -> Tensor:
                history: list[Any]
                (labels,) = (value.numpy().astype(np.int64) for value in conditions.values())
                rows = np.concatenate([labels, np.full_like(labels, null)]) if guided else labels
                latent = noise.numpy() * np.float32(plan.initial_scale)
                history = [np.zeros_like(latent)] * 3
                for step in plan.steps:
                    c_x, c_out, a, b_0, b_1, b_2 = (np.float32(value) for value in step.solver)
                    inputs = {
                        "latent": np.concatenate([latent, latent]) if guided else latent,
                        "times": np.full(len(rows), step.t, np.float32),
                        "labels": rows,
                    }
                    output = session.run(None, inputs)[0][:, :channels]
                    if guided:
                        conditional, unconditional = np.split(output, 2)
                        output = unconditional + np.float32(scale) * (conditional - unconditional)
                    history = [c_x * latent + c_out * output, *history[:2]]
                    latent = a * latent + b_0 * history[0] + b_1 * history[1] + b_2 * history[2]
                result = torch.from_numpy(latent)
                check_finite(result, result.dtype)
                return result

            yield run
