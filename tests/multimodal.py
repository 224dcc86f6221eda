"""Tiny multimodal models of the real classes, and what they are asked about an image."""

from __future__ import annotations

from typing import Any

import torch
from any_family import BASE, M_ROPE, MIXED, VOCAB
from transformers import AutoConfig, AutoModelForMultimodalLM, PreTrainedModel

IMAGE, START, END, VIDEO = VOCAB - 4, VOCAB - 3, VOCAB - 2, VOCAB - 1  # tokens
EYE = {
    **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"image_size": 8, "patch_size": 4},
}
QWEN_EYE = {
    **{
        "depth": 1,
        "num_heads": 2,
        "patch_size": 4,
        "temporal_patch_size": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
    },
    "out_hidden_size": 32,
}
QWEN = {"vision_start_token_id": START, "vision_end_token_id": END, "video_token_id": VIDEO}
# of each: fields of the text model beside `any_family.BASE`, of the vision tower, and of the whole
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": ({**MIXED, "head_dim": 16, "query_pre_attn_scalar": 20}, EYE, {"mm_tokens_per_image": 4}),
    "idefics3": ({"model_type": "llama"}, EYE, {"scale_factor": 2}),  # as SmolVLM
    "llava": ({"model_type": "llama"}, {**EYE, "model_type": "clip_vision_model", "num_hidden_layers": 2}, {}),
    "mistral3": (
        {"model_type": "mistral", "sliding_window": None},
        {**EYE, "model_type": "pixtral", "image_size": 16, "head_dim": 8},
        {"spatial_merge_size": 2},
    ),
    "qwen2_5_vl": (M_ROPE, {**QWEN_EYE, "window_size": 8, "fullatt_block_indexes": [0]}, QWEN),
    "qwen3_vl": (
        {**M_ROPE, "head_dim": 8},
        {**QWEN_EYE, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        QWEN,
    ),
}


def build_whole(row: str, **text: Any) -> PreTrainedModel:
    """A random multimodal model in eval mode."""
    of_text, of_eye, fields = ROWS[row]
    fields = {**fields, "image_token_id": IMAGE, "image_token_index": IMAGE}
    torch.manual_seed(0)
    config = AutoConfig.for_model(row, text_config={**BASE, **of_text, **text}, vision_config=of_eye, **fields)
    whole = AutoModelForMultimodalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif not parameter.any():  # biases, and Gemma's projection
                parameter.normal_(std=0.2)
    return whole.eval()


def question(row: str, time: int = 20) -> dict[str, torch.Tensor]:
    """A text of so many tokens about an image, which stands at its fourth token."""
    generator = torch.manual_seed(1)
    ids = torch.randint(1, IMAGE, (1, time), generator=generator)
    places, size = {"idefics3": 1, "mistral3": 2}.get(row, 4), (16, 8) if row == "mistral3" else (8, 8)
    if row.startswith("qwen"):  # 4 x 6 patches, of which 2 x 2 are a token
        ids[:, 4], ids[:, 5:11], ids[:, 11] = START, IMAGE, END
        image = {"pixel_values": torch.randn(24, 48, generator=generator), "image_grid_thw": torch.tensor([[1, 4, 6]])}
        return {"input_ids": ids, **image, "mm_token_type_ids": (ids == IMAGE).long()}
    ids[:, 4 : 4 + places] = IMAGE
    asked = {"input_ids": ids, "pixel_values": torch.randn(1, 3, *size, generator=generator)}
    if row == "idefics3":
        asked["pixel_values"] = asked["pixel_values"][None]
    if row == "gemma3":
        asked["token_type_ids"] = (ids == IMAGE).long()
    return asked | ({"image_sizes": torch.tensor([size])} if row == "mistral3" else {})
