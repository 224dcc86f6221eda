"""How many bytes vLLM holds for the KV cache of a converted model: blocks of tokens, grouped by kind of layer.

All groups of layers share pages of one size: a page is a block of one layer. Where no layer has a window, all layers form
one group and each has pages of its own. Otherwise a group has as many layers as the rarest kind has (or the most frequent
one, if that is less than 1.5 times as many); the last group of a kind may be short of layers, whose pages stay empty.
Source: `_get_kv_cache_groups_uniform_page_size` in vllm/v1/core/kv_cache_utils.py of vLLM 0.32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, lcm
from typing import Any

from pl_attnedit.attention import GatedDeltaNetConfig, GateSWAConfig, MLAConfig
from pl_attnedit.errors import UserError
from pl_attnedit.modeling.plan import EditPlan
from pl_attnedit.teachers import attention_spec

BLOCK = 16  # tokens in a block, vLLM's own choice on GPUs; 128 on CPUs. Beside states blocks are longer: `state_block`
HIT_BLOCKS = (
    8  # prefix hits end at common multiples of the groups' blocks; a latent's block makes these no longer than this
)


@dataclass(frozen=True)
class Layer:
    """What one layer caches: values per token, and of which tokens. window None = of all, and `sinks` is 0 then.

    state: float32 values that are kept in place of `values` per token. The block of the last token holds them, so that a
    state is like a window of two tokens, the last one and the next.
    """

    values: int
    window: int | None = None
    sinks: int = 0
    latent: bool = False
    state: int = 0

    def blocks(self, tokens: int, block: int) -> int:
        """Blocks held for a text while the last of its `tokens` tokens is computed."""
        skipped = 0 if self.window is None else max(0, tokens - self.window) // block
        return ceil(tokens / block) - skipped + min(ceil(self.sinks / block), skipped)


@dataclass(frozen=True)
class Group:
    """Layers that share their tables of blocks. `pages`: values in a block of all of them, empty places included."""

    layer: Layer
    block: int
    pages: int


def layers_of(config: Any, ranks: int = 1) -> list[Layer]:
    """What each layer of a converted model or a teacher caches on one of `ranks` tensor-parallel devices.

    Raises:
        UserError: a target that vLLM does not serve.
    """
    spec = attention_spec(config)
    full = 2 * spec.head_dim * max(1, spec.num_kv_heads // ranks)
    edit = getattr(config, "attention_edit", None)
    if edit is None:
        return [Layer(full)] * config.num_hidden_layers
    plan = EditPlan.from_dict(edit)
    layers = []
    for target in map(plan.target_of, range(len(plan.letters))):
        if isinstance(target, MLAConfig):
            layers.append(Layer(target.kv_lora_rank + target.qk_rope_head_dim, latent=True))
        elif isinstance(target, GateSWAConfig) and target.window is not None:
            layers.append(Layer(full, target.window, target.sinks))
        elif isinstance(target, GatedDeltaNetConfig):
            heads, key, value = target.shape(spec)
            state = key * value + (target.conv_kernel - 1) * (2 * key + value)
            layers.append(Layer(full, window=2, state=heads // ranks * state))
        elif target is None or isinstance(target, GateSWAConfig):
            layers.append(Layer(full))
        else:
            raise UserError(f"target {target.type}: vLLM does not know it")
    return layers


def state_block(layers: Sequence[Layer], block: int, itemsize: int) -> int:
    """Tokens in a block of each layer: so many times `block` that the largest state fits the page of keys and values."""
    tokens = max(ceil(4 * layer.state / (itemsize * layer.values)) for layer in layers)
    return block * max(1, ceil(tokens / block))


def latent_block(layers: Sequence[Layer], latent: Layer, block: int) -> tuple[int, int | None]:
    """Tokens in a block of a latent, and the values that its page is padded to (None = not padded).

    Beside windows pages have the size of those of keys and values, and a block has as many tokens as the page has room for
    and `HIT_BLOCKS` allows, since prefix hits end where blocks of all groups do.
    """
    if not any(layer.window for layer in layers):
        return block, None
    page = block * max(layer.values for layer in layers if not layer.latent)
    fitting = range(page // latent.values, 0, -1)
    tokens = next((n for n in fitting if n % block == 0 or lcm(n, block) <= HIT_BLOCKS * block), None)
    if tokens is None:
        raise UserError(
            f"kv_lora_rank + qk_rope_head_dim = {latent.values}: a token of it must fit the page of the layers beside it, "
            f"which is {block} tokens of {page // block} values; raise --block-size"
        )
    return tokens, page


def groups_of(layers: Sequence[Layer], block: int = BLOCK, itemsize: int = 2) -> list[Group]:
    """The groups of vLLM for a model of these layers, whose keys and values have `itemsize` bytes each."""
    kinds, block = Counter(layers), state_block(layers, block, itemsize)
    if len(kinds) == 1 or not any(layer.window for layer in layers):
        return [Group(layers[0], block, block * sum(layer.values for layer in layers))]
    size, most = min(kinds.values()), max(kinds.values())
    if most < 1.5 * size:
        size = most
    page = block * max(layer.values for layer in layers if not layer.latent)
    groups = []
    for layer, count in kinds.items():
        own = latent_block(layers, layer, block)[0] if layer.latent else block
        groups += [Group(layer, own, size * page)] * ceil(count / size)
    return groups


def held_bytes(config: Any, tokens: int, itemsize: int, block: int = BLOCK, ranks: int = 1) -> int:
    """Bytes of whole blocks that vLLM holds on each device for one text of `tokens` tokens while it is continued.

    While a prompt is computed, windows hold up to `max_num_batched_tokens` tokens more.
    """
    groups = groups_of(layers_of(config, ranks), block, itemsize)
    return itemsize * sum(group.layer.blocks(tokens, group.block) * group.pages for group in groups)
