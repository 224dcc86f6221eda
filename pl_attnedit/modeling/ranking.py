"""Layer sensitivity: what editing one layer alone costs, as a file, and edit plans made of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pl_attnedit.errors import invalid
from pl_attnedit.modeling.plan import FULL

COST = {"kl": "kl", "answers": "answer_loss"}  # by what layers are chosen: the column of the file that says it


@dataclass(frozen=True)
class Sensitivity:
    """What editing one layer costs without training, by pattern letter and layer, in nats per token: the forward
    KL(teacher||student), or what answers that stand far back lose.
    """

    cost: Mapping[str, Sequence[float]]

    @classmethod
    def read(cls, path: str | Path) -> Sensitivity:
        """From a file of `pl-attnedit sensitivity`. Raises `UserError` for anything else."""
        try:
            content = json.loads(Path(path).expanduser().read_text("utf-8"), parse_constant=_no_number)
            by = COST[content.get("by", "kl")]
            return cls({letter: [float(one[by]) for one in column] for letter, column in content["layers"].items()})
        except OSError as error:
            raise invalid("sensitivity", str(path), f"cannot be read ({error.strerror})") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise invalid("sensitivity", str(path), f"is no file of `pl-attnedit sensitivity` ({error!r})") from error

    def order(self, letters: str) -> list[int]:
        """The edited layers of a plan (a letter for each layer), the most sensitive first."""
        for letter in set(letters) - {FULL}:
            if len(self.cost.get(letter, ())) != len(letters):
                known = ", ".join(f"{name} for {len(costs)} layers" for name, costs in self.cost.items())
                raise invalid("sensitivity", letter, f"was not measured for {len(letters)} layers; there are {known}")
        edited = [index for index, letter in enumerate(letters) if letter != FULL]
        return sorted(edited, key=lambda index: -self.cost[letters[index]][index])

    def plan(self, cached: Mapping[str, Sequence[int]], budget: float) -> str:
        """Letters of an edit plan within a KV budget.

        Every layer starts with the letter that caches least (among equals, the lowest score). Then, as long as the budget
        allows, the change of one layer's letter is made that lowers the sum of the scores most per byte. The sum treats
        layers as independent, which holds only roughly.

        Args:
            cached: bytes that each layer caches with each letter, `F` among them, at the context of the budget.
            budget: cached bytes of the whole model, student / teacher.
        """
        indices = range(len(cached[FULL]))
        letters = [  # F where nothing is saved, as in layers that a pattern leaves alone
            min(cached, key=lambda letter: (cached[letter][index], self._score(letter, index), letter != FULL))
            for index in indices
        ]
        smallest, full = sum(cached[letter][i] for i, letter in enumerate(letters)), sum(cached[FULL])
        if not smallest <= budget * full or budget > 1:
            raise invalid("budget", budget, f"must be from {smallest / full:.4f}, all layers edited, to 1")
        left = budget * full - smallest
        while True:
            exchanges = []
            for index in indices:
                for letter in cached:
                    extra = cached[letter][index] - cached[letters[index]][index]
                    gain = self._score(letters[index], index) - self._score(letter, index)
                    if 0 < extra <= left and gain > 0:
                        exchanges.append((gain / extra, -index, extra, letter))
            if not exchanges:
                return "".join(letters)
            _, index, extra, letter = max(exchanges)
            letters[-index] = letter
            left -= extra

    def _score(self, letter: str, index: int) -> float:
        return 0.0 if letter == FULL else self.cost[letter][index]


def _no_number(constant: str) -> float:
    raise ValueError(f"{constant} is no number")


def kv_share(cached: Mapping[str, Sequence[int]], letters: str) -> float:
    """The KV budget of an edit plan, a letter for each layer; cached: as in `Sensitivity.plan`."""
    return sum(cached[letter][index] for index, letter in enumerate(letters)) / sum(cached[FULL])


def spread_evenly(letters: str, letter: str, among: Sequence[int] | None = None) -> str:
    """As many full layers as in `letters`, evenly spread as in SSSF; the others get `letter`. Layers that are not in `among`
    (None = all) stay as they are."""
    among = range(len(letters)) if among is None else among
    layers, full, spread = len(among), sum(letters[index] == FULL for index in among), list(letters)
    places = {-(-(k + 1) * layers // full) - 1 for k in range(full)}
    for place, index in enumerate(among):
        spread[index] = FULL if place in places else letter
    return "".join(spread)
