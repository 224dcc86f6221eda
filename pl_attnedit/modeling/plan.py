"""The edit plan: which layer gets which target. Data, not code; saved in the converted model's config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pl_attnedit.attention import TargetConfig, target_from_dict
from pl_attnedit.errors import UserError, invalid

FULL = "F"  # the letter of a full layer, which keeps the teacher's own attention


@dataclass(frozen=True)
class EditPlan:
    """One letter per layer, and the target behind each letter but `F`."""

    letters: str
    targets: Mapping[str, TargetConfig]

    def __post_init__(self) -> None:
        for letter in self.targets:
            if not isinstance(letter, str) or len(letter) != 1 or letter == FULL:
                raise invalid("targets", letter, f"each key is one letter other than {FULL}, which is the full layer")
        for letter in self.letters:
            if letter != FULL and letter not in self.targets:
                known = ", ".join([*self.targets, FULL])
                raise invalid("pattern", self.letters, f"letter {letter!r} has no target; there are {known}")

    @classmethod
    def build(
        cls,
        num_layers: int,
        targets: TargetConfig | Mapping[str, TargetConfig],
        pattern: str | None = None,
        layers: Sequence[int] | None = None,
        among: Sequence[int] | None = None,
    ) -> EditPlan:
        """From a pattern that repeats over the layers, or from explicit indices of the layers to edit.

        One config alone is the letter S. `layers` needs exactly one target; every other layer stays full. `among`: the
        layers that a pattern's letters are for, the others are F; None = all. A pattern of as many letters as there are
        layers names each.
        """
        if isinstance(targets, TargetConfig):
            targets = {"S": targets}
        if (
            not isinstance(targets, Mapping)
            or not targets
            or not all(isinstance(t, TargetConfig) for t in targets.values())
        ):
            raise invalid(
                "targets", targets, "must be a target config or a mapping of pattern letters to target configs"
            )
        if layers is not None:
            if pattern is not None:
                raise UserError("pattern and layers: give one of them, not both")
            if len(targets) != 1:
                raise invalid("layers", layers, f"needs exactly one target, not {len(targets)}")
            if not isinstance(layers, Sequence) or isinstance(layers, str):
                raise invalid("layers", layers, "must be a list of layer indices")
            for index in layers:
                if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < num_layers:
                    raise invalid("layers", index, f"must be a layer index from 0 to {num_layers - 1}")
            letter = next(iter(targets))
            return cls("".join(letter if i in set(layers) else FULL for i in range(num_layers)), dict(targets))
        if pattern is None:
            if len(targets) != 1:
                raise UserError(f"pattern: is needed with several targets ({', '.join(targets)})")
            letter, target = next(iter(targets.items()))
            pattern = target.default_pattern.replace("S", letter)
        if not isinstance(pattern, str) or not pattern:
            raise invalid("pattern", pattern, "must be letters such as 'SSSF'")
        cls(pattern, targets)  # checks all its letters
        among = range(num_layers) if among is None or len(pattern) == num_layers else among
        letters = [FULL] * num_layers
        for place, index in enumerate(among):
            letters[index] = pattern[place % len(pattern)]
        return cls("".join(letters), dict(targets))

    @property
    def edited_layers(self) -> list[int]:
        """Indices of the layers that get a target, in order."""
        return [index for index, letter in enumerate(self.letters) if letter != FULL]

    def require_edits(self) -> None:
        """`UserError` for a plan that leaves nothing to train."""
        if not self.edited_layers:
            raise invalid("pattern", self.pattern, "edits no layer: every letter is F")

    @property
    def pattern(self) -> str:
        """The shortest pattern that repeats to this plan, e.g. SSSF."""
        lengths = range(1, len(self.letters) + 1)
        repeats = (self.letters[:n] for n in lengths if (self.letters[:n] * len(self.letters)).startswith(self.letters))
        return next(repeats, "")

    def target_of(self, layer_idx: int) -> TargetConfig | None:
        """The target of a layer, None for a full layer."""
        return self.targets.get(self.letters[layer_idx])

    def to_dict(self) -> dict[str, Any]:
        return {"layers": self.letters, "targets": {letter: t.to_dict() for letter, t in self.targets.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EditPlan:
        layers, targets = (data.get("layers"), data.get("targets")) if isinstance(data, Mapping) else (None, None)
        if not isinstance(layers, str) or not isinstance(targets, Mapping):
            raise invalid("attention_edit", data, "must hold `layers` (a letter each) and `targets`")
        return cls(layers, {letter: target_from_dict(fields) for letter, fields in targets.items()})
