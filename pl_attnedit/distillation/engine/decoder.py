"""A family's own decoder in parts: what comes before its layers, what a layer does around its attention, the head.

No form of a block is repeated here: Hugging Face's own forward passes run, in shallow copies in which one part is another.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MoeModelOutputWithPast

from pl_attnedit.attention.interface import Enough, by_keyword
from pl_attnedit.errors import UserError
from pl_attnedit.teachers.base import rotary_of

Call = dict[str, Any]  # the keyword arguments of a decoder layer, or of its attention, apart from the hidden states
NORMS = ("norm", "final_layernorm", "embedding_norm", "norm_f")  # what families call the norm behind the last layer


def with_parts(module: nn.Module, **parts: nn.Module) -> Any:
    """A shallow copy of a module with other submodules of these names. All else, weights included, is shared."""
    shell = copy.copy(module)
    shell._modules = {**module._modules, **parts}
    return shell


class _InPlaceOf(nn.Module):
    """Stands where another module was, whose attributes may be read here."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._other = (module,)  # in a tuple: no submodule

    def __getattr__(self, name: str) -> Any:
        return self.__dict__[name] if name in self.__dict__ else getattr(self.__dict__["_other"][0], name)


class _Recorder(_InPlaceOf):
    """Replaces a layer and records how it is called."""

    def __init__(self, layer: nn.Module, calls: list[tuple[Tensor, Call]], layers: int) -> None:
        super().__init__(layer)
        self._record = (calls, layers)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls, layers = self._record
        calls.append((hidden_states, by_keyword(self._other[0], args, kwargs)))
        if len(calls) == layers:
            raise Enough
        return hidden_states


def enter_decoder(model: Any, embedded: Tensor, position_ids: Tensor | None) -> tuple[Tensor, list[Call]]:
    """What a decoder passes to its first layer for these embeddings (batch, time, hidden), and to each layer with it."""
    calls: list[tuple[Tensor, Call]] = []
    if position_ids is not None and hasattr(rotary_of(model), "mrope_section"):
        position_ids = position_ids.expand(4, *position_ids.shape)  # first the mask's, which tell documents apart
    recorders = [_Recorder(layer, calls, len(model.layers)) for layer in model.layers]
    try:
        shell = with_parts(model, layers=nn.ModuleList(recorders))
        type(model).forward(shell, inputs_embeds=embedded, position_ids=position_ids, use_cache=False)
    except Enough:
        pass
    except (TypeError, ValueError) as error:
        what = f"{type(model).__name__} takes more from its layers than hidden states ({error})"
        raise UserError(f"teacher: {what}, and cannot be trained layer by layer") from error
    return calls[0][0], [call for _, call in calls]


def final_norm(model: Any) -> nn.Module:
    """The norm behind a decoder's last layer."""
    for name in NORMS:
        if hasattr(model, name):
            return getattr(model, name)
    raise UserError(f"teacher: {type(model).__name__} has no final norm under a known name ({', '.join(NORMS)})")


class _Given(_InPlaceOf):
    """A decoder whose last hidden states are given."""

    def forward(self, inputs_embeds: Tensor, **_: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)


class Head(nn.Module):
    """A language model's own head, with what it does to the logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.lm_head = model.lm_head
        if self.lm_head.bias is not None:
            raise UserError(f"teacher: the head of {type(model).__name__} has a bias, which the loss knows nothing of")
        self._model = (with_parts(model, model=_Given(model.model), lm_head=nn.Identity()),)  # in a tuple: no submodule
        probe = torch.linspace(-1e3, 1e3, 5, device=self.lm_head.weight.device)[None]
        self.finish = None if torch.equal(self._finish(probe), probe) else self._finish

    @property
    def weight(self) -> Tensor:
        """(vocabulary, hidden)"""
        return self.lm_head.weight

    def _finish(self, products: Tensor) -> Tensor:
        """What becomes of the products with `weight`, (tokens, vocabulary), before they are logits."""
        return self._model[0].forward(inputs_embeds=products[None]).logits[0]

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits (tokens, vocabulary) of hidden states (tokens, hidden)."""
        products = self.lm_head(hidden)
        return products if self.finish is None else self.finish(products)


class _Tap(nn.Module):
    """Stands where a layer has its attention."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self._keywords = partial(by_keyword, attention)
        self.attend: Callable[[Tensor, Call], Tensor] | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        assert self.attend is not None
        return self.attend(hidden_states, self._keywords(args, kwargs)), None


def tapped(layer: Any) -> Any:
    """The layer for the functions below: its own forward pass, its own modules, but its attention."""
    return with_parts(layer, self_attn=_Tap(layer.self_attn))


def run_around(layer: Any, hidden: Tensor, call: Call, attend: Callable[[Tensor, Call], Tensor]) -> Any:
    """Output of a tapped layer (batch, time, hidden) whose attention is `attend`, called with its input and arguments."""
    layer.self_attn.attend = attend
    try:
        return first(layer(hidden, **call))
    except Enough:
        return None
    finally:
        layer.self_attn.attend = None


def first(output: Any) -> Tensor:
    """Hidden states out of what a layer returns."""
    return output if isinstance(output, Tensor) else output[0]


def enter_layer(layer: Any, hidden: Tensor, call: Call) -> tuple[Tensor, Call]:
    """What a tapped layer gives its attention: hidden states and arguments."""
    seen = []

    def note(entered: Tensor, attention_call: Call) -> Tensor:
        seen.append((entered, attention_call))
        raise Enough

    run_around(layer, hidden, call, note)
    return seen[0]


def leave_layer(layer: Any, hidden: Tensor, call: Call, attention: Tensor) -> Tensor:
    """What a tapped layer makes of its attention's output."""
    return run_around(layer, hidden, call, lambda entered, attention_call: attention)


def run_teacher(
    layer: Any, attention: nn.Module, hidden: Tensor, call: Call, last: bool
) -> tuple[Tensor | None, Tensor, Call, Tensor]:
    """Output of a tapped layer with its own attention (None where `last`, which stops behind it), the attention's input,
    its arguments and its output."""
    seen = []

    def note(entered: Tensor, attention_call: Call) -> Tensor:
        output = attend(attention, entered, attention_call)
        seen.append((entered, attention_call, output))
        if last:
            raise Enough
        return output

    return run_around(layer, hidden, call, note), *seen[0]


def run_layer(layer: Any, hidden: Tensor, call: Call) -> Tensor:
    """Output of a layer as it is."""
    return first(layer(hidden, **call))


def attend(attention: Callable[..., Any], entered: Tensor, call: Call) -> Tensor:
    """Output of an attention, called as its layer does."""
    return attention(hidden_states=entered, **call)[0]
