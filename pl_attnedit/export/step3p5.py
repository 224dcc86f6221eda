"""A GateSWA conversion of a dense Qwen3 as a stock Step-3.5 checkpoint: the text model of `step3p7`, alone.

vLLM and SGLang have it, transformers does not. Weights are those of `step3p7`, see there. vLLM's class wants a layer with
experts: the last one has its MLP as the shared expert, and one routed expert of a few kilobytes whose weights are zero.
`lm_head` is written out where embeddings are tied: vLLM's class fills it from the file only.
"""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from transformers import PreTrainedModel

from pl_attnedit.export.checks import plain_rope_theta, refuse_unless
from pl_attnedit.export.step3p7 import check, text_fields, text_weights
from pl_attnedit.files import json_text

FORMAT = "step3p5"
EXPERT = 32  # the width of the routed expert


def write(student: PreTrainedModel, folder: Path) -> None:
    """Saves weights, config.json and generation_config.json into `folder`.

    Raises:
        UserError: for what Step-3.5 cannot express.
    """
    targets = check(student, FORMAT)
    config = student.config
    groups, last = config.num_key_value_heads, config.num_hidden_layers - 1
    refuse_unless(groups > 1, FORMAT, "num_key_value_heads", groups, "vLLM's class takes more than one; use step3p7")
    fields = text_fields(student, targets)
    fields |= {
        "architectures": ["Step3p5ForCausalLM"],
        "model_type": FORMAT,
        "dtype": str(student.dtype).removeprefix("torch."),
        "num_attention_groups": groups,
        "rope_theta": plain_rope_theta(student, FORMAT),
        "use_head_wise_attn_gate": True,
        "tie_word_embeddings": False,
        "moe_layers_enum": str(last),
        "share_expert_dim": config.intermediate_size,
        "moe_num_experts": 1,
        "moe_top_k": 1,
        "moe_intermediate_size": EXPERT,
        "moe_router_activation": "softmax",
    }
    del fields["mlp_layer_types"], fields["rope_parameters"]
    weights = text_weights(student, "model.")
    weights["lm_head.weight"] = student.lm_head.weight.detach().clone()
    layer, hidden = f"model.layers.{last}.", config.hidden_size
    weights = {name.replace(f"{layer}mlp.", f"{layer}share_expert."): weight for name, weight in weights.items()}
    shapes = {"gate": (1, hidden), **dict.fromkeys(("gate_proj", "up_proj"), (1, EXPERT, hidden))}
    for name, shape in {**shapes, "down_proj": (1, hidden, EXPERT)}.items():
        weights[f"{layer}moe.{name}.weight"] = torch.zeros(shape, dtype=student.dtype)
    weights[f"{layer}moe.router_bias"] = torch.zeros(1)
    save_torch_state_dict(weights, folder)
    (folder / "config.json").write_text(json_text(fields), "utf-8")
    student.generation_config.save_pretrained(folder)
