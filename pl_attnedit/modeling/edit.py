"""`edit_model`: from a trained model to a student with a cheaper attention. `load`: a saved student."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from pl_attnedit.attention import LayerStatistics, Target, TargetConfig, init_of
from pl_attnedit.attention.own_windows import use_own_windows
from pl_attnedit.errors import UserError, invalid
from pl_attnedit.modeling.calibration import CalibrationBatch, statistics_in_parts
from pl_attnedit.modeling.hf import EditedModelMixin, config_of_text, edited_classes, edited_config
from pl_attnedit.modeling.plan import EditPlan
from pl_attnedit.teachers import (
    EDITED_PREFIX,
    attention_of,
    check_teacher_config,
    editable_layers,
    model_class,
    output_projection,
)
from pl_attnedit.teachers.multimodal import auto_class, is_multimodal, text_of
from pl_attnedit.teachers.sources.checks import check_adapter, reading_config


def edit_model(
    teacher: PreTrainedModel,
    targets: TargetConfig | Mapping[str, TargetConfig],
    *,
    pattern: str | None = None,
    layers: Sequence[int] | None = None,
    init: str = "calibrated",
    calibration: Iterable[CalibrationBatch] | None = None,
) -> PreTrainedModel:
    """A student with the teacher's trunk and new attention in the layers of the edit plan.

    The trunk's modules (embeddings, norms, MLP, head, attention of full layers) are the teacher's own, shared, not
    copied: one copy in memory. `unshare_trunk` gives the student its own before the trunk is trained.

    Args:
        teacher: a Hugging Face causal language model.
        targets: one target config, or a mapping of pattern letters to configs.
        pattern: letters repeated over the layers, F = full layer. Default "S" for MLA, "SSSF" for others. Where some layers
            of the teacher see a window or are no attention, over those that see everything; the others stay as they are.
        layers: explicit indices of the layers to edit instead of a pattern.
        init: "random" as in the paper (`o_proj` inherited), "copy" of the teacher's weights where shapes allow,
            "calibrated": the best fit on the calibration text (for GateSWA, the copy), "plain_svd" (MLA only): a plain
            conversion from the literature, as a baseline.
        calibration: the calibration text, an iterable of input ids (batch, time) int64, or of dicts as `collect_statistics`
            takes them. "calibrated" and "plain_svd" need it, but for GateSWA.

    Raises:
        UserError: an argument does not fit the teacher.
    """
    check_teacher(teacher)
    plan = build_plan(teacher.config, targets, pattern, layers)
    student = assemble(teacher, plan)
    initialise(student, teacher, init, calibration)
    return student


def build_plan(
    config: PreTrainedConfig,
    targets: TargetConfig | Mapping[str, TargetConfig],
    pattern: str | None = None,
    layers: Sequence[int] | None = None,
) -> EditPlan:
    """The edit plan for a teacher's config: letters of a pattern are for its full layers, see `editable_layers`."""
    return EditPlan.build(config.num_hidden_layers, targets, pattern, layers, among=editable_layers(config))


def check_teacher(teacher: PreTrainedModel) -> None:
    """Raises `UserError` for a model that cannot be converted."""
    if not isinstance(teacher, PreTrainedModel):
        raise invalid("teacher", type(teacher).__name__, "must be a Hugging Face causal LM (a PreTrainedModel)")
    if isinstance(teacher, EditedModelMixin):
        raise UserError(f"teacher of type {type(teacher).__name__}: is a converted model already")
    check_teacher_config(teacher.config)
    family = model_class(teacher.config)
    if not isinstance(teacher, family):
        raise UserError(f"teacher of type {type(teacher).__name__}: must be a {family.__name__}")
    for name, module in teacher.model.layers.named_modules():
        linear = ".self_attn." in name and hasattr(module, "in_features")
        if linear and (type(module) is not nn.Linear or module.weight.dtype.itemsize < 2):
            weight = getattr(module, "weight", None)
            kind = type(module).__name__ + (f" of {weight.dtype}" if isinstance(weight, torch.Tensor) else "")
            raise UserError(f"teacher: {name} is a {kind}; load the model unquantised, in 16 or 32 bits")


def assemble(teacher: PreTrainedModel, plan: EditPlan) -> PreTrainedModel:
    """A student that shares the teacher's trunk; the new attention modules hold uninitialised weights."""
    use_own_windows(teacher.model)  # as the student's layers do, some of which are the teacher's
    config = edited_config(teacher.config, plan)
    with torch.device("meta"):
        student: Any = edited_classes(teacher.config.model_type)[1](config)
    for mine, theirs in ((student, teacher), (student.model, teacher.model)):
        mine._parameters, mine._buffers = theirs._parameters, theirs._buffers  # those outside of any part of it
        for name, module in theirs.named_children():
            if name not in ("model", "layers"):
                mine.register_module(name, module)
    for index, layer in enumerate(teacher.model.layers):
        # the layer itself is the student's own: Hugging Face's hooks on it would collect twice what both return
        edited, full = student.model.layers[index], plan.target_of(index) is None
        edited._parameters, edited._buffers = layer._parameters, layer._buffers
        for name, module in layer.named_children():
            if full or name != "self_attn":
                edited.register_module(name, module)
        if full:
            continue
        weight = output_projection(layer.self_attn).weight
        edited.self_attn.to_empty(device=weight.device).to(weight.dtype)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.train(teacher.training)


def initialise(
    student: PreTrainedModel, teacher: PreTrainedModel, init: str, calibration: Iterable[CalibrationBatch] | None
) -> None:
    """Fills the new attention modules of an assembled student."""
    edited = edited_attention(student)
    for module in edited.values():
        init_of(module.target, init).check(module.target, module.spec)
    needed = layers_that_need_text(student, init)
    initialise_from(student, teacher, init, {}, edited.keys() - set(needed))
    if not needed:
        return
    if calibration is None:
        raise UserError(f"calibration: init {init!r} needs an iterable of input-id batches for this target")
    outputs = any(init_of(module.target, init).needs_outputs for module in edited.values())
    for statistics in statistics_in_parts(teacher, needed, calibration, outputs):
        initialise_from(student, teacher, init, statistics, statistics)
        statistics.clear()  # before the next are collected


def layers_that_need_text(student: PreTrainedModel, init: str) -> list[int]:
    """The layers whose init uses statistics of text."""
    return [index for index, module in edited_attention(student).items() if init_of(module.target, init).needs_text]


def initialise_from(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    init: str,
    statistics: Mapping[int, LayerStatistics],
    layers: Collection[int] | None = None,
) -> None:
    """`initialise` with statistics that exist already, by layer index; of some layers, None = all edited ones."""
    for index, module in edited_attention(student).items():
        if layers is not None and index not in layers:
            continue
        init_of(module.target, init).fill(module, teacher.model.layers[index].self_attn, statistics.get(index))


def edited_attention(student: PreTrainedModel) -> dict[int, Target]:
    """The student's new attention modules by layer index."""
    attention = enumerate(map(attention_of, student.model.layers))
    return {index: module for index, module in attention if isinstance(module, Target)}


def unshare_trunk(student: PreTrainedModel) -> None:
    """Gives the student its own copy of everything it shares with the teacher, in place; needed to train the trunk."""
    memo: dict[int, Any] = {id(module): module for module in edited_attention(student).values()}
    copied: nn.Module = copy.deepcopy(student.model, memo)
    head_tied = student.lm_head.weight is student.model.embed_tokens.weight
    student.model = copied
    student.lm_head = copy.deepcopy(student.lm_head)
    if head_tied:
        student.lm_head.weight = student.model.embed_tokens.weight


def read_config(path: Path) -> Any:
    """The config of a converted model; of a multimodal one that of its text model.

    Raises:
        UserError: there is none.
    """
    return config_of_text(_whole_config(path, stock=False))


def _whole_config(path: Path, *, stock: bool) -> Any:
    check_adapter("path", path)
    if not (path / "config.json").is_file():
        raise invalid("path", str(path), "must be the folder of a converted model (it has no config.json)")
    with reading_config("path", str(path)):
        config = AutoConfig.from_pretrained(path)
    if not stock and not config.model_type.startswith(EDITED_PREFIX):
        raise invalid("path", str(path), f"holds a model of type {config.model_type!r}, which is not a converted model")
    return config


def load(path: str | Path, *, stock: bool = False, **kwargs: Any) -> PreTrainedModel:
    """A converted model from its folder, in eval mode. `kwargs` go to `from_pretrained` (dtype, device_map ...).

    Of a multimodal model it is the text model alone; transformers' `AutoModelForImageTextToText` loads the whole.

    Args:
        stock: also load causal language models of Hugging Face's own classes, such as `pl_attnedit.export` writes.

    Raises:
        UserError: the folder holds no converted model, or its weights are broken or incomplete.
    """
    path = Path(path).expanduser()
    config = _whole_config(path, stock=stock)
    if config.model_type == "step3p7":  # its text model is part of a vision model, and has no class of its own
        reason = "exports in the format step3p7 cannot, those in deepseek_v3 can; give the student itself"
        raise invalid("path", str(path), f"cannot be loaded as a causal language model ({reason})")
    options = {"config": config, "output_loading_info": True, "use_safetensors": True, **kwargs}  # no pickle
    try:
        loaded: Any = auto_class(config).from_pretrained(path, **options)
    except UserError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        raise invalid("path", str(path), f"its weights cannot be read ({error})") from error
    except ValueError as error:  # a class without a language-model head of text alone
        reason = str(error).splitlines()[0]  # the others name all classes that have one
        raise invalid("path", str(path), f"cannot be loaded as a causal language model ({reason})") from error
    model, found = loaded
    wrong = sorted([*found["missing_keys"], *found["unexpected_keys"]])
    if wrong:  # Hugging Face only warns, and fills in random weights
        raise invalid("path", str(path), f"its weights do not fit its config.json: {', '.join(wrong[:4])} ...")
    return (text_of(model, config_of_text(config)) if is_multimodal(config) else model).eval()
