"""Statistics of a teacher's attention for the calibrated init: second moments, accumulated over the calibration text.

A fixed number of inputs, sampled uniformly from all tokens, is kept as well, because the effect of a norm on the latent does
not follow from moments. So the memory depends on the model's width only, not on the number of tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pl_attnedit.attention.interface import Rotation, exact_device, heads_of, not_turned
from pl_attnedit.attention.own_windows import attend_as_teacher
from pl_attnedit.teachers import AttentionSpec

SINK_COLUMNS = 4  # first tokens, left out of the distances: attention to them does not depend on the distance
WEIGHT_FLOOR = 0.1  # share of the plain mean in the weighted moments, so that no token is ignored
PAIRS_AT_ONCE = 2**28  # attention probabilities, over the batch and the queries of a key head: 1 GiB in float32
SAMPLES = 4096  # inputs kept; several times the rank of any latent in use


class LayerStatistics:
    """Moments of one layer: inputs x (with a constant 1 appended), queries and keys before RoPE, values.

    Entries of query and key heads are in the order of `Rotation.order`, whatever the family's is: those of the first half
    turn with those of the second, in pair i by `frequencies[i]` per token.

    `plain` moments weigh all tokens alike (queries). `weighted` ones weigh a token by the squared attention it receives,
    which is what an error in its key or value does to the output (keys, values). All are float64 means.
    """

    def __init__(self, spec: AttentionSpec, rotation: Rotation, context: int, outputs: bool = True) -> None:
        """rotation: the layer's RoPE; context: tokens per calibration sequence; outputs: whether `output` is wanted."""
        self.spec, self.order = spec, rotation.order
        exact = exact_device(rotation.order.device)
        self.frequencies, self.offered = rotation.frequencies.to(exact), rotation.offered.to(exact)
        self.rope_scale, self._rotation = rotation.scale, rotation
        device = self.frequencies.device
        width = spec.hidden_size + 1

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.tokens = 0
        self.weight = 0.0
        self._plain_xx, self._weighted_xx = zeros(width, width), zeros(width, width)
        self._xq = zeros(width, spec.num_heads * spec.head_dim)
        kv_width = 2 * spec.num_kv_heads * spec.head_dim
        self._plain_xkv, self._weighted_xkv = zeros(width, kv_width), zeros(width, kv_width)
        self._distance, self._output = zeros(context), zeros(spec.num_heads) if outputs else None
        self._sample = torch.zeros(SAMPLES, width, device=rotation.order.device)
        self._sample_weight = torch.zeros(SAMPLES, device=rotation.order.device)  # attention received
        # Reservoir sampling: the tokens with the largest random keys. On the CPU, where the generator is.
        self._sample_key = torch.full((SAMPLES,), -1.0, device="cpu")
        self._random = torch.Generator().manual_seed(0)

    @staticmethod
    def size(spec: AttentionSpec, context: int) -> int:
        """Bytes that the statistics of a layer hold."""
        width = spec.hidden_size + 1
        moments = width * (2 * width + (spec.num_heads + 4 * spec.num_kv_heads) * spec.head_dim)
        return 8 * (moments + context) + 4 * SAMPLES * (width + 2)

    @torch.no_grad()
    def update(
        self,
        source: nn.Module,
        hidden_states: torch.Tensor,
        call: dict[str, Any],
        position_ids: torch.Tensor | None = None,
    ) -> None:
        """Adds one batch. hidden_states (batch, time, hidden) and `call` are the inputs of the teacher's attention `source`;
        position_ids (batch, time) begin at 0 with each document where documents do not see each other."""
        query, key, value, options = heads_of(source, hidden_states, not_turned(call))
        query, key = query[..., self.order], key[..., self.order]
        turned = self._rotation.turn(query, call), self._rotation.turn(key, call)
        received = self._attention_received(*turned, position_ids)
        if self._output is not None:
            mask, scale = call.get("attention_mask"), options.get("scaling") or self.spec.scaling
            output = attend_as_teacher(*turned, value, mask, scale, options.get("s_aux"), options.get("softcap"))
            heads = output.unflatten(-1, (self.spec.num_heads, -1)).transpose(1, 2)
            self._output += self._exact(heads.float().square().mean(-1).sum((0, 2)))
        x = torch.cat([hidden_states, torch.ones_like(hidden_states[..., :1])], dim=-1).flatten(0, 1).float()
        q = query.transpose(1, 2).flatten(2).flatten(0, 1).float()
        kv = torch.cat([key, value], dim=1).transpose(1, 2).flatten(2).flatten(0, 1).float()
        weighted = x * received.flatten()[:, None]
        self._plain_xx += self._exact(x.T @ x)
        self._weighted_xx += self._exact(weighted.T @ x)
        self._xq += self._exact(x.T @ q)
        self._plain_xkv += self._exact(x.T @ kv)
        self._weighted_xkv += self._exact(weighted.T @ kv)
        self._draw(x, received.flatten())
        self.tokens += x.shape[0]
        self.weight += received.sum().item()

    def _draw(self, x: torch.Tensor, received: torch.Tensor) -> None:
        """Keeps a uniform sample of all tokens so far: x (tokens, width), received (tokens,)."""
        keys = torch.cat([self._sample_key, torch.rand(len(x), generator=self._random, device="cpu")])
        self._sample_key, kept = keys.topk(SAMPLES)
        kept = kept.to(x.device)
        self._sample = torch.cat([self._sample, x])[kept]
        self._sample_weight = torch.cat([self._sample_weight, received])[kept]

    def _attention_received(
        self, query: torch.Tensor, key: torch.Tensor, position_ids: torch.Tensor | None
    ) -> torch.Tensor:
        """Sum over queries of the squared probability that each token gets, mean over heads: (batch, time).

        Also adds the attention by distance. One key head and so many queries at a time that the scores
        stay small.
        """
        groups, time = query.shape[1] // key.shape[1], query.shape[2]
        at = torch.arange(time, device=query.device)
        if position_ids is None:
            document, position_ids = None, at.expand(query.shape[0], time)
        else:
            document = (position_ids == 0).cumsum(-1)
        sinks = (position_ids < SINK_COLUMNS)[:, None, None, :]
        received = torch.zeros(query.shape[0], time, device=query.device)
        for rows in at.split(max(PAIRS_AT_ONCE // (query.shape[0] * groups * time), 1)):
            here = slice(int(rows[0]), int(rows[-1]) + 1)
            hidden = (rows[:, None] < at[None, :]).expand(query.shape[0], -1, -1)  # from a query: what comes later
            if document is not None:  # and other documents
                hidden = hidden | (document[:, here, None] != document[:, None, :])
            by_pair = torch.zeros(len(rows), time, device=query.device)
            for head in range(key.shape[1]):
                scores = query[:, head * groups : (head + 1) * groups, here] @ key[:, head : head + 1].transpose(-1, -2)
                scores = (scores.float() * self.spec.scaling).masked_fill(hidden[:, None], float("-inf")).softmax(-1)
                received += scores.square().sum((1, 2))
                by_pair += scores.masked_fill_(sinks, 0).sum((0, 1))
            distance = (rows[:, None] - at[None, :]).clamp(min=0)
            self._distance.scatter_add_(0, self._exact(distance.flatten()), self._exact(by_pair.flatten()).double())
        return received / query.shape[1]

    @property
    def sample(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs (samples, hidden + 1), and each one's weight (samples,) in the weighted moments."""
        count = min(self.tokens, SAMPLES)  # those with the largest keys stand first
        weight = self._exact(self._sample_weight[:count]).double()
        return self._exact(self._sample[:count]).double(), weight * self.tokens / self.weight + WEIGHT_FLOOR

    @property
    def plain_xx(self) -> torch.Tensor:
        """(hidden + 1, hidden + 1) second moment of the inputs."""
        return self._plain_xx / self.tokens

    @property
    def weighted_xx(self) -> torch.Tensor:
        """(hidden + 1, hidden + 1), tokens weighted by the attention they receive."""
        return self._mix(self._weighted_xx, self._plain_xx)

    @property
    def xq(self) -> torch.Tensor:
        """(hidden + 1, heads * head_dim) inputs against queries."""
        return self._xq / self.tokens

    @property
    def weighted_xkv(self) -> torch.Tensor:
        """(hidden + 1, 2 * kv_heads * head_dim) inputs against keys, then values, weighted."""
        return self._mix(self._weighted_xkv, self._plain_xkv)

    @property
    def output(self) -> torch.Tensor:
        """(heads,) root mean square of each head's output, before the output projection."""
        assert self._output is not None
        return (self._output / self.tokens).sqrt()

    @property
    def distance(self) -> torch.Tensor:
        """(context,) share of the attention by distance between query and key, sums to 1."""
        return self._distance / self._distance.sum()

    def _exact(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(self.frequencies.device)

    def _mix(self, weighted: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
        return weighted / self.weight + WEIGHT_FLOOR * plain / self.tokens
