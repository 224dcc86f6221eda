"""Converted models as Hugging Face models: for each family a config and a model class, made when they are asked for.

`attnedit_llama` is `llama` with a field `attention_edit` (the edit plan) in its config; its model builds the family's own
model and swaps the attention of the edited layers. `edited_classes` makes and registers the classes, as a look-up of such a
type in transformers does, so that `AutoModelForCausalLM.from_pretrained`, `.generate` and `pipeline` work on saved models.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import transformers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from pl_attnedit.attention import TARGETS
from pl_attnedit.attention.own_windows import use_own_windows
from pl_attnedit.errors import UserError, invalid
from pl_attnedit.modeling.entry import OwnEntryFile, WithEntryFile
from pl_attnedit.modeling.plan import EditPlan
from pl_attnedit.teachers import EDITED_PREFIX, model_class
from pl_attnedit.teachers.base import fields_of
from pl_attnedit.teachers.multimodal import is_multimodal, text_config, whole_class

AUTO_CLASSES: tuple[Any, ...] = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
PREFIX, SUFFIX = "Edited", "ForCausalLM"


class EditedConfigMixin(OwnEntryFile):
    """A converted model's config carries `rope_theta` at the top level too.

    transformers 4 ignores `rope_parameters` and would silently rotate with theta 10000. Loading checks that both agree.
    """

    base_model_tp_plan = None  # rules for the teacher's projections, which do not hold for targets

    def __post_init__(self, **kwargs: Any) -> None:
        outer = kwargs.get("rope_theta")
        super().__post_init__(**kwargs)  # type: ignore[misc]
        inner = self._rope_theta
        if outer is not None and inner is not None and outer != inner:
            raise invalid(
                "rope_theta", outer, f"config.json also says rope_parameters.rope_theta = {inner}; must agree"
            )

    @property
    def _rope_theta(self) -> float | None:
        """None where kinds of layers have one each, or there is no RoPE."""
        return (getattr(self, "rope_parameters", None) or {}).get("rope_theta")

    def to_dict(self) -> dict[str, Any]:
        theta = self._rope_theta
        return {**super().to_dict(), **({} if theta is None else {"rope_theta": theta})}  # type: ignore[misc]


class EditedModelMixin(OwnEntryFile, WithEntryFile):
    """Swaps the attention modules that the config's edit plan names, before any weight is loaded.

    What Hugging Face offers for causal LMs and targets cannot do is refused here, by name.
    """

    # these kernels get no mask where texts are packed or go on behind a cache, and targets need one
    _supports_flash_attn = False
    _supports_flex_attn = False
    _tp_plan = None

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        plan = EditPlan.from_dict(config.attention_edit)
        text, decoder = text_config(config), self.get_decoder() if is_multimodal(config) else self.model  # type: ignore[attr-defined]
        if len(plan.letters) != text.num_hidden_layers:
            raise invalid("attention_edit", plan.letters, f"needs a letter for each of {text.num_hidden_layers} layers")
        for index in plan.edited_layers:
            target = plan.target_of(index)
            assert target is not None
            layer = decoder.layers[index]
            layer.self_attn = TARGETS[target.type].replacing(layer.self_attn, target, text, index)
        use_own_windows(decoder)
        self.register_forward_pre_hook(_refuse_attentions, with_kwargs=True)  # type: ignore[attr-defined]

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Of `generate_batch`, `ContinuousBatchingManager` and `transformers serve --continuous-batching`."""
        raise UserError(
            f"{type(self).__name__}: continuous batching (generate_batch) pages the cache in a way that its layers do not "
            "know; use generate with a padded batch, or serve the model with vLLM"
        )

    @property
    def edit_plan(self) -> EditPlan:
        """Which layer has which target."""
        return EditPlan.from_dict(self.config.attention_edit)


def _refuse_attentions(model: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Edited layers compute no matrix of weights; Hugging Face would leave them out of its list without a word."""
    if kwargs.get("output_attentions", model.config.output_attentions):
        raise UserError("output_attentions: edited layers return no attention weights; ask the teacher for them")


@cache
def edited_classes(model_type: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    """The classes of converted models of a family, e.g. `llama`; `UserError` for what is none."""
    example = AutoConfig.for_model(model_type)
    whole = is_multimodal(example)
    family = whole_class(example) if whole else model_class(example)
    config_class: Any = family.config_class
    name = PREFIX + family.__name__
    config: Any = type(
        f"{name.removesuffix(SUFFIX)}Config",
        (EditedConfigMixin, config_class),
        {
            "__module__": __name__,
            "__doc__": f"Config of a converted {model_type} model; `attention_edit` is its edit plan.",
            "__annotations__": {"attention_edit": dict | None},
            "attention_edit": None,
            "model_type": EDITED_PREFIX + model_type,
        },
    )
    model: Any = type(
        name,
        (EditedModelMixin, family),
        {
            "__module__": __name__,
            "__doc__": f"A converted {model_type} model.",
            "config_class": config,
            # transformers looks for it in the source of the class's module, and else runs experts one after another
            "_can_set_experts_implementation": family._can_set_experts_implementation,
        },
    )
    globals()[config.__name__], globals()[model.__name__] = config, model  # so that they can be pickled by name
    AutoConfig.register(config.model_type, config)
    for auto in AUTO_CLASSES if whole else AUTO_CLASSES[:1]:
        auto.register(config, model)
    # `transformers serve` takes the class from its module, of which it makes a second one; both are of one type
    setattr(type(transformers), model.__name__, model)
    return config, model


def __getattr__(name: str) -> Any:
    """`EditedLlamaConfig`, `EditedLlamaForCausalLM` and so on: what entry files of saved models import."""
    family = name.removeprefix(PREFIX).removesuffix("Config").removesuffix(SUFFIX)
    known = [getattr(transformers, each, None) for each in (family, family + SUFFIX, family + "Config")]
    found = next((each for each in known if each is not None), None) if name.startswith(PREFIX) else None
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return edited_classes(getattr(found, "config_class", found).model_type)[0 if name.endswith("Config") else 1]


def config_of_text(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the text model in a multimodal model, converted if it is; or the config itself."""
    text, plan = text_config(config), getattr(config, "attention_edit", None)
    return text if text is config or plan is None else edited_config(text, EditPlan.from_dict(plan))


def put_back(student: Any, folder: Path, state: dict[str, Tensor]) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """The multimodal model in a teacher's folder with a student of its text model in it; and its state, of the student's."""
    whole: Any = AutoModelForMultimodalLM.from_pretrained(folder, dtype="auto", use_safetensors=True)
    places = {id(module): name for name, module in whole.named_modules()}
    names = {"model": places[id(whole.get_decoder())], "lm_head": places[id(whole.get_output_embeddings())]}
    text = tuple(f"{name}." for name in names.values())
    kept = {name: tensor for name, tensor in whole.state_dict().items() if not name.startswith(text)}
    own = {names[part] + dot + rest: t for name, t in state.items() for part, dot, rest in [name.partition(".")]}
    for part, name in names.items():
        whole.set_submodule(name, getattr(student, part))
    whole.__class__ = edited_classes(whole.config.model_type)[1]
    whole.config = edited_config(whole.config, student.edit_plan)
    whole._weight_conversions = []  # its names are saved as they are, not as those of the teacher's files
    return whole, kept | own


def edited_config(teacher_config: PreTrainedConfig, plan: EditPlan) -> PreTrainedConfig:
    """The converted model's config: all of the teacher's fields and the edit plan."""
    if teacher_config.model_type.startswith(EDITED_PREFIX):
        raise UserError(f"teacher model type {teacher_config.model_type!r}: is already converted")
    config_class, _ = edited_classes(teacher_config.model_type)
    config = config_class(**{**fields_of(teacher_config), "attention_edit": plan.to_dict()})
    config._attn_implementation = teacher_config._attn_implementation
    return config
