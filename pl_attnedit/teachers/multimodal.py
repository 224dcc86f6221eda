"""Multimodal checkpoints: their text model is the teacher. It is taken out, and put back when the student is saved."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING

from pl_attnedit.errors import UserError, invalid
from pl_attnedit.registration import EDITED_PREFIX
from pl_attnedit.teachers.base import model_class

TOKENS = 8


def is_multimodal(config: PreTrainedConfig) -> bool:
    """Whether a model of this config reads more than text, and has a text model in it."""
    return config.get_text_config() is not config


def auto_class(config: PreTrainedConfig) -> Any:
    """The class of transformers that loads a model of this config with its head."""
    return AutoModelForMultimodalLM if is_multimodal(config) else AutoModelForCausalLM


def whole_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Hugging Face's class of a multimodal model; `UserError` where it has none that generates text."""
    known: Any = MODEL_FOR_MULTIMODAL_LM_MAPPING
    found = known.get(type(config), None)
    if found is None or not found.__name__.endswith("ForConditionalGeneration"):
        what = "transformers has no class for it (one named ...ForConditionalGeneration) that has a text model"
        raise invalid("teacher model type", config.model_type, what)
    return found


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the text model in a multimodal model of this config, which is named in its `part_of`; or the config."""
    if not is_multimodal(config):
        return config
    text = copy.deepcopy(config.get_text_config())
    text.tie_word_embeddings = getattr(config, "tie_word_embeddings", False)  # the whole model's is what counts
    text.dtype = text.dtype or config.dtype
    text.part_of = config.model_type.removeprefix(EDITED_PREFIX)
    return text


def text_of(whole: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """The text model in a multimodal model, as a causal language model of this config. It shares all modules.

    Raises:
        UserError: the text model has another form than such a language model.
    """
    model_class(config)  # which makes one where transformers has none
    with torch.device("meta"):
        text: Any = AutoModelForCausalLM.from_config(config)
    found = {"model": whole.get_decoder(), "lm_head": whole.get_output_embeddings()}
    for name, module in text.named_children():
        if type(module) is not type(found.get(name)):
            what = f"its text model has no {type(module).__name__} as {name}, which {type(text).__name__} has"
            raise invalid("teacher model type", whole.config.model_type, what)
        text.register_module(name, found[name])
    text.config._attn_implementation = whole.config.get_text_config()._attn_implementation
    text.generation_config = copy.deepcopy(whole.generation_config)
    return text.train(whole.training)


@torch.no_grad()
def check_text(whole: PreTrainedModel, text: PreTrainedModel) -> None:
    """`UserError` unless the text model answers a text as the multimodal model does that it is in."""
    ids = torch.arange(TOKENS, device=text.device)[None] % text.config.vocab_size
    theirs, ours = (model(input_ids=ids, use_cache=False).logits.float() for model in (whole, text))
    if (theirs - ours).abs().max() > 1e-2 * theirs.abs().max():
        off = float((theirs - ours).norm() / theirs.norm())
        name = type(whole).__name__
        raise UserError(f"teacher: the text model in {name} alone is off by {off:.1%} from {name} on the same text")
