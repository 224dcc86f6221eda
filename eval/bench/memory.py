"""Memory of a training step, counted from shapes: what each device holds, and what comes and goes.

Weights, gradients and AdamW's moments are exact. The rest is an estimate; per token and layer a backward pass keeps

    4 * hidden                                       layer input, normed input, attention output, second normed input
    heads * (2 * query width + 2 * value width)      query, key, value and output of the attention; targets may keep more
    2 * intermediate                                 gate and up projection (trained: and their product, for the weight)
    2 * intermediate + hidden, for each expert       in a mixture, of the experts that a token goes to

values. Stage 2 keeps this of all layers and works on two layers more (values and their gradients); with activation
checkpointing it keeps the layers' inputs and works on three layers. Stage 1 works on three. The loss holds four chunks of
logits. FSDP2 gathers the layer at work and the next, DDP's buckets are as large as the gradients. Where documents do not see
each other there are masks, (batch, 1, time, time) each: a boolean one for each kind of layer, and one in the dtype of the
scores for each layer that is kept or worked on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from pl_attnedit.attention import LayerStatistics, Target
from pl_attnedit.attention.own_windows import NAME
from pl_attnedit.attention.statistics import PAIRS_AT_ONCE
from pl_attnedit.distillation.engine.decoder import final_norm
from pl_attnedit.distillation.losses import tokens_of_a_chunk
from pl_attnedit.eval.bench.flops import mixture_of, router_of
from pl_attnedit.modeling.calibration import layers_at_once
from pl_attnedit.modeling.edit import edited_attention, layers_that_need_text
from pl_attnedit.teachers import attention_of, attention_spec, layer_specs

CHUNKS_OF_LOGITS = 4  # both models' log-probabilities, the probabilities and the gradient, float32
LAYERS_AT_WORK = 3


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each device."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float  # temporary: gathered layers, gradients or reduction buckets
    activations: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Step:
    """What a step of a stage is. tokens: of one device's batch; devices: of all nodes."""

    stage: str
    tokens: int
    trained: str = "attention"  # stage 2: attention | layers | all
    train_layers: tuple[int, ...] | None = None  # stage 1
    feature_weight: float = 0.0
    activation_checkpointing: bool = False
    devices: int = 1
    shards: int = 1  # devices that share one copy
    itemsize: int = 2  # bytes of an activation
    device_type: str = "cuda"
    seq: int = 0  # tokens of a sequence, for masks; 0: there are none
    documents: bool = False  # whether documents in a sequence do not see each other

    @property
    def trunk_trains(self) -> bool:
        return self.trained != "attention"


def trained_parameters(student: Any, step: Step) -> list[nn.Parameter]:
    """What a stage trains."""
    if step.trained == "all":
        return list(student.parameters())
    if step.trained == "layers":
        return [*student.model.layers.parameters(), *final_norm(student.model).parameters()]
    edited = edited_attention(student)
    chosen = edited if step.train_layers is None else edited.keys() & set(step.train_layers)
    return [p for index in sorted(chosen) for p in edited[index].parameters()]


def stage_memory(teacher: Any, student: Any, step: Step) -> StageMemory:
    """Of teacher and student (on any device, meta too), which need not share their trunk."""
    shards = step.shards
    parameters = trained_parameters(student, step)
    trained = size(parameters)
    new = edited_attention(student).values()
    own = size(student.parameters()) if step.trunk_trains else sum(size(module.parameters()) for module in new)
    return StageMemory(
        weights=(size(teacher.parameters()) + own) / shards,
        gradients=trained / shards,
        optimizer=2 * trained / shards,
        gathered=_gathered(teacher, student, step, parameters) if step.devices > 1 else 0.0,
        activations=_activations(teacher, student, step),
    )


def init_memory(teacher: Any, student: Any, init: str, batch: int, seq: int) -> StageMemory | None:
    """Of the init, where it looks at text; else None. Whatever the strategy each device has all weights, the
    statistics of as many layers as are looked at together, and three times the attention probabilities of one part."""
    looking = layers_that_need_text(student, init)
    if not looking:
        return None
    spec = attention_spec(teacher.config)
    held = min(len(looking), layers_at_once(teacher.config, looking, seq))
    statistics = held * LayerStatistics.size(spec, seq)
    row = batch * spec.num_heads // spec.num_kv_heads * seq
    probabilities = 3 * 4 * min(row * seq, max(row, PAIRS_AT_ONCE))
    new = sum(size(attention.parameters()) for attention in edited_attention(student).values())
    return StageMemory(size(teacher.parameters()) + new, 0.0, 0.0, 0.0, float(statistics + probabilities))


def size(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _gathered(teacher: Any, student: Any, step: Step, trained: list[nn.Parameter]) -> float:
    if step.shards == 1:
        return size(trained)

    def gathered(parameters: Iterable[torch.Tensor]) -> int:  # in the compute dtype, where that is smaller
        return sum(p.numel() * min(p.element_size(), step.itemsize) for p in parameters)

    layers = [
        gathered(teacher.model.layers[index].parameters())
        + gathered((student.model.layers[index] if step.trunk_trains else attention).parameters())
        for index, attention in edited_attention(student).items()
    ]
    if step.stage == "stage1":  # the new attention is not resharded, its gradients wait for the backward pass
        return 2 * max(layers) + 2 * gathered(trained)
    heads = gathered(teacher.lm_head.parameters()) * (2 if step.trunk_trains else 1)
    return 2 * max(layers) + heads


def _activations(teacher: Any, student: Any, step: Step) -> float:
    config, vocabulary = teacher.config, teacher.config.vocab_size
    kept = [kept_values(layer, config, step.trunk_trains) for layer in student.model.layers]
    largest = LAYERS_AT_WORK * max(kept)
    if step.stage == "stage1":
        return step.tokens * step.itemsize * largest + _masks(student, step, LAYERS_AT_WORK)
    # no backward pass below the first edited layer
    behind = kept if step.trunk_trains else kept[min(edited_attention(student)) :]
    values = len(behind) * config.hidden_size if step.activation_checkpointing else sum(behind) - max(kept)
    total: float = step.tokens * step.itemsize * (values + largest)
    total += _masks(student, step, LAYERS_AT_WORK if step.activation_checkpointing else len(behind))
    if step.feature_weight:  # float32 hidden states of both models
        total += step.tokens * 8 * config.hidden_size * len(behind)
    chunk = min(step.tokens, tokens_of_a_chunk(vocabulary, torch.device(step.device_type)))
    total += CHUNKS_OF_LOGITS * 4 * vocabulary * chunk
    return total + (4 * vocabulary * config.hidden_size if step.trained == "all" else 0)  # the head's gradient


def _masks(student: Any, step: Step, layers: int) -> float:
    """layers: how many have one at a time. A teacher's own windows run without a mask where documents see each other."""
    by_kernels = student.model.config._attn_implementation == NAME
    masked = [
        spec.window
        for spec in layer_specs(student.config)
        if spec and (step.documents or (spec.window and not by_kernels and step.seq > spec.window))
    ]
    return step.tokens * step.seq * (len(set(masked)) + step.itemsize * min(len(masked), layers))


def kept_values(layer: Any, config: Any, trained: bool) -> int:
    """Values per token that a layer's forward pass leaves for its backward pass; see the module's text."""
    attention = 4 * config.hidden_size + _kept_by(attention_of(layer), config)
    each = 3 if trained else 2
    if mixture := mixture_of(layer):
        inner = each * getattr(config, "moe_intermediate_size", config.intermediate_size) + config.hidden_size
        return attention + router_of(mixture).top_k * inner
    own = set() if attention_of(layer) is None else set(attention_of(layer).modules())
    down = (
        m for m in layer.modules() if isinstance(m, nn.Linear) and m.out_features == config.hidden_size and m not in own
    )
    return attention + each * sum(m.in_features for m in down)


def _kept_by(attention: Any, config: Any) -> int:
    if attention is None:
        return 0
    if isinstance(attention, Target):
        return attention.kept_values()
    spec = attention_spec(config, attention.layer_idx)
    return spec.num_heads * 2 * (spec.head_dim + spec.value_dim)
