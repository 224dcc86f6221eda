"""What a Gated DeltaNet layer keeps of a text: a state of one size, however long the text is."""

from __future__ import annotations

import torch

from pl_attnedit.attention.caches import OwnLayer
from pl_attnedit.errors import UserError


class StateLayer(OwnLayer):
    """A layer of a cache that holds two tensors with the batch first, as its keys and its values.

    keys (batch, 1, kernel - 1, channels): the last inputs of the convolution. values (batch, heads, key dim, value dim),
    float32: the recurrent state. Both are None before the first token.
    """

    def keep(self, inputs: torch.Tensor, state: torch.Tensor, tokens: int) -> None:
        """Replaces both tensors, after so many more tokens."""
        if not self.is_initialized:
            self.lazy_initialization(inputs, state)
        self.keys, self.values = inputs, state
        self.cumulative_length += tokens

    def hold(self, batch: int) -> None:
        """From now on the state is that of the first sequence, `batch` times, and stays so whatever follows."""
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = (each[:1].repeat(batch, 1, 1, 1) for each in (self.keys, self.values))
        self.keep = lambda inputs, state, tokens: None  # type: ignore[method-assign]

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove and self.is_initialized:
            raise UserError(
                f"cache.crop({tokens_to_remove}): a recurrent state has dropped its tokens; keep a copy of the cache "
                "instead, and generate without assistant_model or prompt_lookup_num_tokens, which take tokens back"
            )
