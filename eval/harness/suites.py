"""Suites: what an evaluation measures, as YAML. `pl_attnedit.eval.evaluate` evaluates a student by one.

`quick`, `fidelity`, `offline` and `paper` lie in configs/suites; any other YAML file of the same form is a suite too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pl_attnedit.config_files import read_yaml
from pl_attnedit.data.files import find_files
from pl_attnedit.data.sources import BUILTIN, SUFFIXES
from pl_attnedit.errors import UserError, in_one_line, invalid
from pl_attnedit.teachers.sources.fingerprint import file_sha256

SUITES = Path(__file__).parents[2] / "configs" / "suites"
# Raised where the tasks that we write ask something else than before, or where results.json says more of the same answers:
# suites then have a new version, too. 2: `fidelity` beside `by_position`; 3: `bigbench`, its tasks pooled;
# 4: texts begin as in training.
TASKS_VERSION = 4
RETRIEVAL_TASKS = ("needle_1", "needle_4", "variables", "copy")


@dataclass(frozen=True)
class TextTasks:
    """Tasks out of held-out text (`pl_attnedit.eval.harness.tasks.build_offline_tasks`).

    Args:
        documents: passages whose perplexity is measured.
        document_chars: their length in characters; English has about four to a token.
        cloze: questions for the true continuation among four.
    """

    documents: int = 8
    document_chars: int = 1600
    cloze: int = 48


@dataclass(frozen=True)
class PositionTask:
    """KL and agreement by position in context.

    Args:
        sequences: of held-out text, at most.
        context: their length in tokens; null = the teacher's context.
    """

    sequences: int
    context: int | None = None


@dataclass(frozen=True)
class RetrievalTasks:
    """Synthetic tasks (`pl_attnedit.eval.harness.retrieval`).

    Args:
        contexts: tokens of a prompt; null = 512 and its doublings up to the teacher's context.
        tasks: needle_1, needle_4, variables, copy.
        depths: where the answer is hidden, 0 = at the beginning, 1 = right before the question.
        samples: for each task, context and depth.
    """

    contexts: list[int] | None = None
    tasks: list[str] = field(default_factory=lambda: [*RETRIEVAL_TASKS])
    depths: list[float] = field(default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9])
    samples: int = 4


@dataclass(frozen=True)
class Generation:
    """What both models write, sampled and greedy (`pl_attnedit.eval.fidelity.generations`).

    Args:
        prompts: beginnings of held-out documents and, where these are too few, what follows on them; at most.
        prompt_tokens: their length.
        new_tokens: longest text that is written.
    """

    prompts: int
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Instructions:
    """Instructions whose answers a program checks (`pl_attnedit.eval.harness.instructions`).

    Args:
        samples: prompts.
        new_tokens: longest answer.
    """

    samples: int
    new_tokens: int


@dataclass(frozen=True)
class BigBenchTasks:
    """BIG-bench's multiple-choice tasks from local JSONL; `bigbench` in the results is all their questions together.

    Args:
        limit: questions of a task, at most; null = all.
    """

    limit: int | None = None


@dataclass(frozen=True)
class LibraryTask:
    """A task, tag or group of lm-eval's own library; a group's samples are pooled.

    Args:
        task: its name in lm-eval.
        num_fewshot: examples in the prompt; null = the task's own number.
        limit: only the first samples; null = all.
    """

    task: str
    num_fewshot: int | None = None
    limit: int | None = None


@dataclass(frozen=True)
class Efficiency:
    """Speed and memory (`pl_attnedit.eval.efficiency`).

    Args:
        contexts: tokens in the cache.
        batches: sequences.
        new_tokens: decode steps that are timed together.
        repeats: of every measurement.
        budget_gb: memory that the largest batch shall fit, in GB; null = not measured.
    """

    contexts: list[int]
    batches: list[int] = field(default_factory=lambda: [1])
    new_tokens: int = 32
    repeats: int = 5
    budget_gb: float | None = None


@dataclass(frozen=True)
class Suite:
    """What an evaluation measures; parts that are left out are not measured.

    Args:
        name: of the suite.
        max_length: longest prompt or window in tokens; null = the teacher's context.
        text: perplexity and cloze of held-out text.
        by_position: KL and agreement, by position in context and over all positions.
        retrieval: synthetic long-context tasks.
        generation: what both write after the same prompts.
        instructions: formats, counts, keywords, JSON.
        bigbench: questions from local files.
        library: tasks of lm-eval's library.
        efficiency: speed and memory.
        margins: for TASK/METRIC, wildcards allowed, the loss that would be accepted, in the metric's unit (0.01 = one
            point of accuracy); the longest name that fits counts.
    """

    name: str
    max_length: int | None = None
    text: TextTasks | None = None
    by_position: PositionTask | None = None
    retrieval: RetrievalTasks | None = None
    generation: Generation | None = None
    instructions: Instructions | None = None
    bigbench: BigBenchTasks | None = None
    library: list[LibraryTask] = field(default_factory=list)
    efficiency: Efficiency | None = None
    margins: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in _numbers("", asdict(self)):
            if value < 1 and not name.startswith((".retrieval.depths", ".margins", ".library", ".efficiency.budget")):
                raise invalid(f"suite {self.name}: {name[1:]}", value, "must be at least 1")
        for task in self.retrieval.tasks if self.retrieval else ():
            if task not in RETRIEVAL_TASKS:
                allowed = ", ".join(RETRIEVAL_TASKS)
                raise invalid(f"suite {self.name}: retrieval.tasks", task, f"must be one of {allowed}")
        for name, value in self.margins.items():
            if value <= 0:
                raise invalid(f"suite {self.name}: margins", f"{name}: {value}", "must be positive")

    @property
    def needs_text(self) -> bool:
        """Whether tasks are made of held-out text."""
        return any(part is not None for part in (self.text, self.by_position, self.retrieval, self.generation))

    @property
    def version(self) -> str:
        """Identifies what the suite measures, on held-out built-in text: its content and the versions of its tasks."""
        return self.version_on()

    def version_on(self, text: str = BUILTIN, bigbench: str | Path | Sequence[str | Path] | None = None) -> str:
        """The version of an evaluation on this text and these questions: of files by their content.

        Raises:
            UserError: no such file.
        """
        later = ("generation", "instructions")  # suites without them keep the version that they had before these came
        parts = {name: part for name, part in asdict(self).items() if part or name not in later}
        content = [parts, TASKS_VERSION, version("lm_eval") if self.library else None]
        files = [bigbench] if isinstance(bigbench, str | Path) else bigbench or []
        if text != BUILTIN or files:
            content += [
                _identity("text", text, SUFFIXES),
                *(_identity("bigbench", str(one), (".jsonl",)) for one in files),
            ]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _identity(field: str, name: str, kinds: Sequence[str]) -> list[str] | str:
    """Of what is on this machine its content, else the name."""
    if name == BUILTIN:
        return name
    return [file_sha256(file) for file in find_files(field, name, kinds, ", ".join(kinds))] or name


def _numbers(path: str, value: Any) -> list[tuple[str, float]]:
    if isinstance(value, dict):
        return [found for key, each in value.items() for found in _numbers(f"{path}.{key}", each)]
    if isinstance(value, list):
        return [found for each in value for found in _numbers(path, each)]
    return [(path, value)] if isinstance(value, int | float) else []


def load_suite(name: str) -> Suite:
    """A suite by name (quick, fidelity, offline, paper) or from a YAML file.

    Raises:
        UserError: no such suite, an unknown field, a value out of range.
    """
    from argparse import ArgumentError

    from jsonargparse import ArgumentParser

    path = Path(name).expanduser() if name.endswith((".yaml", ".yml")) else SUITES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in SUITES.glob("*.yaml")))
        raise invalid("suite", name, f"must be one of {known}, or a .yaml file")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Suite, "suite")
    try:
        return parser.instantiate_classes(parser.parse_object({"suite": read_yaml(path, "suite", "suite")})).suite
    except ArgumentError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        message = in_one_line(str(error)).replace("; --help lists them", "; docs/add/suite.md lists them")
        raise invalid("suite", str(path), f"cannot be read: {message}") from error
