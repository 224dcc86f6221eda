"""A training step's forward and backward pass as one CUDA graph: small models wait for kernel launches, not for kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from pl_attnedit.errors import UserError

Batch = dict[str, Tensor]
Step = Callable[[Batch], tuple[Tensor, Tensor]]
WARM_UP = 2  # steps of a kind before it is recorded: torch.compile and libraries set themselves up
MOST_RECORDINGS = 32  # of one training


class StepGraph:
    """`step` on a batch, with its gradients; recorded once and replayed from then on.

    What is replayed reads the parameters where they are, so optimiser, clipping and checkpoints work as without it. A batch
    of other shapes than the recorded ones, or of another `key`, runs unrecorded; when such batches come again and again, as
    in a phase of longer sequences, they are recorded instead. Without a GPU all runs unrecorded.

    Args:
        step: batch to the loss () and another tensor to report; must not wait for the device.
        parameters: those that get a gradient.
    """

    def __init__(self, step: Step, parameters: Sequence[nn.Parameter]) -> None:
        self.step, self.parameters = step, list(parameters)
        self._seen: Counter[Hashable] = Counter()  # steps of each kind since the last replay
        self._recordings = 0
        self._key: Hashable = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream: torch.cuda.Stream | None = None
        self._batch: Batch = {}
        self._results: tuple[Tensor, Tensor, Sequence[Tensor]] | None = None

    def __call__(self, batch: Batch, key: Hashable = None) -> tuple[Tensor, Tensor]:
        """Loss, whose backward pass only hands out the gradients, and the other tensor, without a gradient.

        key: what else than the batch the step depends on.
        """
        key = (key, *((name, value.shape, value.dtype) for name, value in batch.items()))
        loss, other, gradients = self._run(batch, key)
        anchor = torch.empty((), device=loss.device, requires_grad=True)
        return _HandOut.apply(anchor, loss, self.parameters, gradients), other

    def _run(self, batch: Batch, key: Hashable) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        device = self.parameters[0].device
        if not self._records:
            return self._plain(batch)
        if self._graph is None or key != self._key:
            self._seen[key] += 1
            if self._seen[key] <= WARM_UP or self._recordings == MOST_RECORDINGS:
                if self._seen.total() == WARM_UP + 2:
                    rank_zero_warn(
                        "cuda_graph: steps run unrecorded while their shapes, or what else they depend on, keep changing"
                    )
                return self._beside(partial(self._plain, batch), device)
            self._graph = self._results = None  # its memory goes before the new one's comes
            self._key = key
            self._record(batch, device)
            self._recordings += 1
        self._seen.clear()
        assert self._graph is not None
        assert self._results is not None
        for name, value in batch.items():
            self._batch[name].copy_(value)
        self._graph.replay()
        loss, other, gradients = self._results
        return loss.clone(), other.clone(), gradients

    @property
    def _records(self) -> bool:
        return self.parameters[0].device.type == "cuda"

    def _plain(self, batch: Batch) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        with torch.enable_grad():
            loss, other = self.step(batch)
        with torch.autocast(loss.device.type, enabled=False):
            gradients = torch.autograd.grad(loss, self.parameters, materialize_grads=True)
        return loss.detach(), other.detach(), gradients

    def _beside(self, work: Callable[[], Any], device: torch.device) -> Any:
        """On the stream that records: autograd remembers where a parameter was first used."""
        self._stream = self._stream or torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            found = work()
        torch.cuda.current_stream(device).wait_stream(self._stream)
        return found

    def _record(self, batch: Batch, device: torch.device) -> None:
        self._batch = {name: value.clone() for name, value in batch.items()}
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(device)
        try:
            # of this thread alone: the loader's copies batches meanwhile
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._results = self._plain(self._batch)
        except RuntimeError as error:
            raise UserError(
                f"cuda_graph: this model's step cannot be recorded, leave it out: {str(error).splitlines()[0]}"
            ) from error
        self._graph = graph


class _HandOut(torch.autograd.Function):
    """The loss; its backward pass adds the gradients, times what comes from above, to the parameters' `grad`."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, loss: Tensor, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]
    ) -> Tensor:
        ctx.parameters, ctx.gradients = parameters, gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, None, None, None]:
        for parameter, gradient in zip(ctx.parameters, torch._foreach_mul(ctx.gradients, upstream), strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        ctx.parameters = ctx.gradients = None
        return None, None, None, None
