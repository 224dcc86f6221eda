"""Converted models as vLLM's: of each family its own class, with the attention of the edited layers swapped.

`EditedLlamaForCausalLM` is vLLM's `LlamaForCausalLM`, and so on: the names that a saved model's config.json states.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM
from vllm.model_executor.models.utils import PPMissingLayer

from pl_attnedit.errors import UserError
from pl_attnedit.modeling.hf import edited_classes
from pl_attnedit.modeling.plan import EditPlan
from pl_attnedit.serving.checks import attention_weights, check_config, vllm_name
from pl_attnedit.serving.layers import LAYERS
from pl_attnedit.serving.memory import layers_of, state_block

BASES = {
    "llama": LlamaForCausalLM,
    "mistral": MistralForCausalLM,
    "qwen2": Qwen2ForCausalLM,
    "qwen3": Qwen3ForCausalLM,
    "qwen3_moe": Qwen3MoeForCausalLM,
}


class EditedForCausalLM:
    """Swaps the attention modules that the config's edit plan names, before any weight is loaded."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        self.edit_plan = plan = EditPlan.from_dict(config.attention_edit)
        check_config(
            config,
            all_tokens=vllm_config.scheduler_config.disable_hybrid_kv_cache_manager,
            speculative=vllm_config.speculative_config is not None,
        )
        cache, layers = vllm_config.cache_config, layers_of(config, get_tensor_model_parallel_world_size())
        block = state_block(layers, cache.block_size, vllm_config.model_config.dtype.itemsize)
        if block != cache.block_size:  # as vLLM does for its own models with states
            cache.block_size, cache.user_specified_block_size = block, True
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.absent = attention_weights(config)
        known = vllm_config.compilation_config.static_forward_context
        for index in plan.edited_layers:
            layer = self.model.layers[index]  # type: ignore[attr-defined]
            if isinstance(layer, PPMissingLayer):
                continue
            target, base = plan.target_of(index), layer.self_attn
            assert target is not None
            name = base.attn.layer_name
            del known[name]
            layer.self_attn = LAYERS[type(target)](base, target, config, index, vllm_config, name.removesuffix(".attn"))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """As vLLM's, which would leave a linear module without a weight as it finds it: here all must come once."""

        def renamed() -> Iterable[tuple[str, Tensor]]:
            for name, weight in weights:
                self.absent.discard(name)
                yield vllm_name(name, self.edit_plan), weight

        loaded = super().load_weights(renamed())  # type: ignore[misc]
        if self.absent:
            raise UserError(f"weights of this model are missing: {', '.join(sorted(self.absent)[:4])} ...")
        return loaded


for _family, _base in BASES.items():
    _name = edited_classes(_family)[1].__name__
    globals()[_name] = type(
        _name,
        (EditedForCausalLM, _base),
        {"__module__": __name__, "__doc__": f"A converted {_family} model in vLLM."},
    )
