"""Teachers of a published shape with random weights, `shape:NAME`: all but the quality of a conversion can be tried on them.

Nothing is downloaded. The weights are made on the device itself by integer arithmetic, so they are the same to the bit on
every device, in every process and under every version of torch; the tokenizer makes a token of each byte.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pl_attnedit.errors import invalid

if TYPE_CHECKING:  # `--help` lists the shapes, and does not wait for torch
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

SHAPE_PREFIX = "shape:"
SEED = 0
VERSION = 1  # part of the fingerprint: raise it when the weights become others
END_OF_TEXT = "<|endoftext|>"
BYTES = 256
IN_CACHE, AT_ONCE = 2**15, 2**24  # weights drawn at once, on a CPU and elsewhere; bounds the memory beside them

_TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
    },
    # for tests, of the two families above
    "tiny-qwen3": {"model_type": "qwen3", **_TINY},
    "tiny-qwen3-moe": {
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        **_TINY,
    },
}


def shape_of(teacher: str) -> str | None:
    """NAME of a teacher `shape:NAME`; None for any other teacher.

    Raises:
        UserError: no such shape.
    """
    if not teacher.startswith(SHAPE_PREFIX):
        return None
    name = teacher.removeprefix(SHAPE_PREFIX)
    if name not in SHAPES:
        raise invalid("teacher", teacher, "there is no such shape; known are " + ", ".join(SHAPES))
    return name


def config_of(shape: str) -> PreTrainedConfig:
    """The config of one of `SHAPES`."""
    from transformers import AutoConfig

    fields = {"dtype": "bfloat16", "bos_token_id": None, "eos_token_id": BYTES, "pad_token_id": None, **SHAPES[shape]}
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def write_shape(shape: str, folder: Path) -> None:
    """Config and tokenizer of a shape; there are no weights to write."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    config = config_of(shape)
    config.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # one letter for each byte
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=config.max_position_embeddings,
    ).save_pretrained(folder)


def shape_fingerprint(shape: str, of_config: str) -> str:
    """Hex SHA-256 of what the weights follow from. of_config: the fingerprint of config.json."""
    return hashlib.sha256(f"{of_config} {shape} {SEED} {VERSION}".encode()).hexdigest()


def random_model(
    shape: str, *, layers: int | None = None, dtype: torch.dtype, device: torch.device | str
) -> PreTrainedModel:
    """A model of one of `SHAPES`, in eval mode. Norms are 1, all other weights uniform with the standard deviation that the
    family's own initialisation has; they depend on their names and on nothing else.

    Args:
        layers: another number of layers.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = config_of(shape)
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:1] * layers
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.to_empty(device=device)
    model.tie_weights()
    rotary = model.model.rotary_emb  # its frequencies are no weights, and lost by now
    model.model.rotary_emb = type(rotary)(config=config).to(device)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.fill_(1.0)
            else:
                _draw(weight, name, config.initializer_range)
    return model.eval()


def _draw(weight: torch.Tensor, name: str, deviation: float) -> None:
    """Fills a weight with uniform numbers: a hash (splitmix64's steps, in int64) of the name and of the place in it."""
    import torch

    stream = int.from_bytes(hashlib.sha256(f"{SEED} {name}".encode()).digest()[:7], "little")
    flat = weight.view(-1)
    most = min(IN_CACHE if weight.device.type == "cpu" else AT_ONCE, len(flat))
    places = torch.arange(most, device=weight.device)
    for start in range(0, len(flat), most):
        part = flat[start : start + most]
        bits = (places[: len(part)] + (stream + start)) * -7046029254386353131
        for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
            bits ^= (bits >> shift) & (2 ** (64 - shift) - 1)  # a logical shift: int64 has only the other
            bits *= factor
        half = 2**23
        uniform = ((bits >> 40).float() + 0.5) * (deviation * 3**0.5 / half)  # exact but for the product: 24 bits
        part.copy_(uniform)
