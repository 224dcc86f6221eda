"""The rolling cache of a window layer: it holds the sinks and the last `window - 1` tokens and frees all others."""

from __future__ import annotations

from typing import Any

import torch

from pl_attnedit.attention.caches import OwnLayer
from pl_attnedit.errors import UserError


class SinkWindowLayer(OwnLayer):
    """A layer of a cache that keeps `sinks + window - 1` tokens.

    keys and values are (batch, kv_heads, kept, head_dim). Until a token has to be dropped, all tokens are kept in order.
    Then the first `sinks` slots are the sinks and the others the last `window - 1` tokens. `columns` (batch, kept) is the
    position in the text of each slot, -1 for an empty one; None where no mask was given, so that the sinks are the text's
    first tokens.
    """

    def __init__(self, window: int, sinks: int) -> None:
        super().__init__()
        self.window, self.sinks = window, sinks
        self.columns: torch.Tensor | None = None
        self.update_columns: torch.Tensor | None = None  # the columns of what `update` returned last
        # the model's, for the next `update`, which families call without it
        self.attention_mask: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds new tokens and returns all that their queries may see: what was kept, then the new tokens.

        `attention_mask`, the model's mask (batch, 1, queries, all tokens so far), True = visible, tells with padding which
        tokens are real, and so which are the sinks.
        """
        attention_mask, self.attention_mask = self.attention_mask, None
        length, columns = key_states.shape[-2], self.columns
        if columns is None and attention_mask is not None and self.sinks:
            columns = self._columns_in_order(key_states)
        if columns is not None:
            new = torch.arange(self.cumulative_length, self.cumulative_length + length, device=key_states.device)
            columns = torch.cat([columns, new.expand(columns.shape[0], -1)], dim=-1)
        if self.keys is None or self.values is None or not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            keys, values = key_states, value_states
        else:
            keys = torch.cat([self.keys, key_states], dim=-2)
            values = torch.cat([self.values, value_states], dim=-2)
        self.cumulative_length += length
        self.update_columns = columns
        self._keep(keys, values, columns, attention_mask)
        return keys, values

    def _columns_in_order(self, states: torch.Tensor) -> torch.Tensor:
        """(batch, kept): the columns of what was kept while there was no mask."""
        kept = min(self.cumulative_length, self.sinks + self.window - 1)
        columns = torch.arange(kept, device=states.device)
        dropped = self.cumulative_length - kept
        return torch.where(columns < self.sinks, columns, columns + dropped).expand(states.shape[0], -1)

    def _keep(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        columns: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
    ) -> None:
        recent = self.window - 1
        first_recent = keys.shape[-2] - recent
        if first_recent <= self.sinks:
            self.keys, self.values, self.columns = keys, values, columns
            return
        if columns is None:
            self.keys, self.values = (
                torch.cat([states[:, :, : self.sinks], states[:, :, first_recent:]], dim=2) for states in (keys, values)
            )
            return
        if attention_mask is None:
            slots = torch.arange(self.sinks, device=keys.device).expand(keys.shape[0], -1)
            sink_columns = columns[:, : self.sinks]
        else:
            real = attention_mask[:, 0, -1, :].expand(keys.shape[0], -1)
            held = real.gather(-1, columns.clamp(min=0)) & (columns >= 0)
            is_sink = held & (held.cumsum(-1) <= self.sinks)
            # the sinks' slots in order; a sink that is still among the recent tokens is not kept twice
            slots = torch.argsort((~is_sink).long(), dim=-1, stable=True)[:, : self.sinks]
            taken = is_sink.gather(-1, slots) & (slots < first_recent)
            sink_columns = columns.gather(-1, slots).masked_fill(~taken, -1)
        index = slots[:, None, :, None]

        def select(states: torch.Tensor) -> torch.Tensor:
            sinks = states.gather(2, index.expand(-1, states.shape[1], -1, states.shape[3]))
            return torch.cat([sinks, states[:, :, first_recent:]], dim=2)

        self.keys, self.values = select(keys), select(values)
        self.columns = torch.cat([sink_columns, columns[:, first_recent:]], dim=-1)

    def reset(self) -> None:
        super().reset()
        self.columns = None

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove == 0 or self.keys is None:
            return
        if self.cumulative_length > self.keys.shape[-2]:
            raise UserError(
                f"cache.crop({tokens_to_remove}): a window layer has already dropped tokens that the shorter text needs "
                f"(window {self.window}, {self.cumulative_length} tokens seen); keep a copy of the cache instead, and "
                "generate without assistant_model or prompt_lookup_num_tokens, which take tokens back"
            )
        super().crop(tokens_to_remove)
        self.cumulative_length = self.keys.shape[-2]
        if self.columns is not None:
            self.columns = self.columns[:, : self.cumulative_length]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._select_columns(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._select_columns(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.columns is not None:
            self.columns = self.columns.repeat_interleave(repeats, dim=0)

    def _select_columns(self, indices: torch.Tensor) -> None:
        if self.columns is not None:
            self.columns = self.columns[indices.to(self.columns.device)]
