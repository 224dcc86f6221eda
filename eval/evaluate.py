"""The evaluation of a saved student by a suite: tasks, positions in context, retrieval, speed and memory."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from pl_attnedit.errors import invalid
from pl_attnedit.eval.fidelity.by_position import by_position, compare_positions, fidelity, packed_sequences
from pl_attnedit.eval.fidelity.generations import METRICS, by_document, generations, prompts_of
from pl_attnedit.eval.harness.answers import (
    TaskRequest,
    answers_folder,
    circumstances,
    digest,
    evaluation_mode,
    kept,
    write_samples,
)
from pl_attnedit.eval.harness.differences import EvaluationResult, compare_samples
from pl_attnedit.eval.harness.instructions import INSTRUCTIONS_TASK, build_instructions
from pl_attnedit.eval.harness.paired import AnsweredPair, answer_both, model_context
from pl_attnedit.eval.harness.retrieval import build_retrieval_tasks
from pl_attnedit.eval.harness.suites import Efficiency, Suite
from pl_attnedit.eval.harness.tasks import BIGBENCH, OFFLINE_TASKS, build_bigbench_tasks, build_offline_tasks
from pl_attnedit.eval.held_out import HeldOut, held_out_texts, trained_on
from pl_attnedit.eval.students import load_pair
from pl_attnedit.files import write_atomically
from pl_attnedit.modeling.trained_on import TrainedOn
from pl_attnedit.teachers.sources.fingerprint import model_fingerprint
from pl_attnedit.teachers.sources.resolve import teacher_fingerprint

SHORTEST_CONTEXT = 512  # tokens, of retrieval where a suite names none
log = logging.getLogger(__name__)
Rows = list[dict[str, Any]]
Files = str | Path | Sequence[str | Path]


def evaluate_suite(
    suite: Suite,
    student: str | Path,
    teacher: str,
    *,
    out_dir: str | Path,
    text: str = "builtin:",
    bigbench: Files | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    batch_size: int | str = "auto",
) -> EvaluationResult:
    """Evaluate a saved student against its teacher. An evaluation that was interrupted goes on in the same `out_dir`.

    Args:
        student: folder of a converted or an exported model, or a checkpoint of a training (`load_student`).
        teacher: hub name, folder, GGUF file, package:NAME or shape:NAME.
        out_dir: receives results.json, the tasks, and one jsonl per task and model with every sample.
        text: see `held_out_texts`; documents that the student was trained on are left out.
        bigbench: files, or their folder, for a suite with `bigbench`.
        device: torch device.
        dtype: of both models' weights, such as float32; None = the one in which the student is saved.
        batch_size: see `answer_both`.

    Raises:
        UserError: something that the suite needs is missing.
    """
    if suite.bigbench and bigbench is None:
        raise invalid("--bigbench", None, f"suite {suite.name} needs BIG-bench's questions: a folder or .jsonl files")
    out = Path(out_dir)
    pair = _Pair(suite, student, teacher, device, dtype)
    trained = trained_on(student)
    held_out = held_out_texts(teacher, text, trained) if suite.needs_text else HeldOut([], 0)
    texts = held_out.texts
    # what can be missing is noticed before the models have answered for hours
    requests = build_tasks(suite, texts, pair.tokenizer, out / "tasks", pair.max_length, bigbench, trained)
    tokens, prompts = pair.sequences(texts), pair.prompts(texts)
    found = pair.answer(requests, out, batch_size)
    if prompts is not None:
        pair.generate(prompts, found, out)
    further: dict[str, Any] = {}
    if tokens is not None:
        further |= pair.by_position(tokens, out / ".answers")
    if suite.retrieval:
        further["retrieval"] = retrieval_rows(found, suite.retrieval.tasks)
    if suite.efficiency:
        further |= pair.efficiency(suite.efficiency)
    result = EvaluationResult(
        compare_samples(found.pairs, found.higher_is_better, suite.margins, pools_of(requests)),
        found.samples,
        {**found.settings, "text": text, **held_out.settings},
        {"name": suite.name, "version": suite.version_on(text, bigbench)},
        further,
    )
    for name in suite.margins:
        if not any(fnmatch(f"{row.task}/{row.metric}", name) for row in result.tasks):
            log.warning("suite %s: margins: %s fits nothing that was measured", suite.name, name)
    write_atomically(out / "results.json", result.to_json())
    return result


class _Pair:
    """Teacher and student of an evaluation, loaded, with what identifies them."""

    def __init__(self, suite: Suite, student: str | Path, teacher: str, device: str, dtype: str | None) -> None:
        self.suite = suite
        of_teacher, of_student, self.tokenizer = load_pair(student, teacher, dtype, device)
        self.models: tuple[Any, Any] = of_teacher, of_student
        self.teacher_print = teacher_fingerprint(teacher)
        self.student_print = model_fingerprint(student)
        context = model_context(of_teacher, suite.max_length or SHORTEST_CONTEXT)
        self.max_length = suite.max_length or context
        if self.max_length > context:
            raise invalid("max_length", self.max_length, f"must be at most the teacher's context of {context} tokens")
        if suite.efficiency and max(suite.efficiency.contexts) >= context:
            contexts = suite.efficiency.contexts
            raise invalid("efficiency.contexts", contexts, f"must be below the teacher's context of {context} tokens")

    def answer(self, requests: Sequence[TaskRequest], out: Path, batch_size: int | str) -> AnsweredPair:
        return answer_both(
            *self.models,
            self.tokenizer,
            requests,
            max_length=self.max_length,
            batch_size=batch_size,
            out_dir=out,
            teacher_fingerprint=self.teacher_print,
            student_fingerprint=self.student_print,
        )

    def sequences(self, texts: Sequence[str]) -> torch.Tensor | None:
        """The text of `by_position`, (sequences, context)."""
        options = self.suite.by_position
        if options is None:
            return None
        context = min(options.context or self.max_length, self.max_length)
        return packed_sequences(texts, self.tokenizer, options.sequences, context)

    def prompts(self, texts: Sequence[str]) -> tuple[torch.Tensor, list[int]] | None:
        """Of `generation`, (prompts, tokens) and the document of each."""
        options = self.suite.generation
        if options is None:
            return None
        longest = self.max_length - options.prompt_tokens
        if options.new_tokens > longest:
            raise invalid("generation.new_tokens", options.new_tokens, f"must be at most {longest} after such prompts")
        return prompts_of(texts, self.tokenizer, options.prompts, options.prompt_tokens)

    def generate(self, prompts: tuple[torch.Tensor, list[int]], found: AnsweredPair, out: Path) -> None:
        """Adds the task `generation` to what was found."""
        assert self.suite.generation is not None
        with evaluation_mode(*self.models):
            samples = generations(
                *self.models,
                self.tokenizer,
                *prompts,
                self.suite.generation.new_tokens,
                prints=(self.teacher_print, self.student_print),
                folders=(answers_folder(), out / ".answers"),
            )
        found.pairs["generation"] = list(zip(*map(by_document, samples.values()), strict=True))
        found.higher_is_better["generation"] = METRICS
        found.samples.extend(write_samples(out, name, "generation", rows) for name, rows in samples.items())

    def by_position(self, tokens_NT: torch.Tensor, folder: Path) -> dict[str, Any]:
        """`by_position` and `fidelity` of results.json."""
        of_teacher, of_student = map(circumstances, self.models)
        teacher = f"hidden-{self.teacher_print[:32]}-{digest(of_teacher)[:16]}"
        text = hashlib.sha256(tokens_NT.numpy().tobytes()).hexdigest()
        key = {"positions": list(tokens_NT.shape), "text": text, "teacher": teacher, "student": self.student_print}

        def measure() -> dict[str, Any]:
            with evaluation_mode(*self.models):
                values = compare_positions(*self.models, tokens_NT, teacher_kept_in=answers_folder() / teacher)
            return {"by_position": by_position(values), "fidelity": fidelity(values)}

        found, _ = kept(folder, {**key, **of_student}, measure)
        return {name: found[name] for name in ("by_position", "fidelity")}

    def efficiency(self, options: Efficiency) -> dict[str, Rows]:
        """Never kept: speed is of the machine as it is now."""
        from pl_attnedit.eval.efficiency import largest_batch, measure_efficiency

        sizes = asdict(options)
        budget = sizes.pop("budget_gb")
        with evaluation_mode(*self.models):
            models = dict(zip(("teacher", "student"), self.models))
            found = {"efficiency": measure_efficiency(models, **sizes)}
            if budget is not None:
                found["largest_batch"] = [
                    {"model": name, **largest_batch(model, context, round(budget * 1e9))}
                    for name, model in models.items()
                    for context in options.contexts
                ]
        return found


def build_tasks(
    suite: Suite,
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    max_length: int,
    bigbench: Files | None = None,
    trained: TrainedOn | None = None,
) -> list[TaskRequest]:
    """Write the suite's own tasks into `folder`; returns the requests for these and for lm-eval's library."""
    names: list[str] = []
    if text := suite.text:
        sizes = {"n_documents": text.documents, "document_chars": text.document_chars, "n_cloze": text.cloze}
        build_offline_tasks(texts, folder, **sizes, tokenizer=tokenizer, max_length=max_length)
        names += OFFLINE_TASKS
    if suite.bigbench and bigbench is not None:
        names += build_bigbench_tasks(bigbench, folder, suite.bigbench.limit, trained)
    if suite.retrieval:
        retrieval = asdict(suite.retrieval)
        retrieval["contexts"] = contexts = suite.retrieval.contexts or _doublings(max_length)
        if not contexts or max(contexts) > max_length:
            raise invalid("retrieval.contexts", contexts, f"must be numbers up to {max_length} tokens")
        build_retrieval_tasks(texts, tokenizer, folder, **retrieval)
        names += suite.retrieval.tasks
    if suite.instructions:
        build_instructions(tokenizer, folder, **asdict(suite.instructions))
        names.append(INSTRUCTIONS_TASK)
    library = [TaskRequest(each.task, None, each.num_fewshot, each.limit) for each in suite.library]
    return [*(TaskRequest(name, folder) for name in names), *library]


def pools_of(requests: Sequence[TaskRequest]) -> dict[str, list[str]]:
    """All BIG-bench tasks from local files, under the name `bigbench`; lm-eval's library has others, without a folder."""
    names = [each.name for each in requests if each.folder and each.name.startswith(BIGBENCH + "_")]
    return {BIGBENCH: names} if names else {}


def _doublings(longest: int) -> list[int]:
    contexts, context = [], SHORTEST_CONTEXT
    while context <= longest:
        contexts.append(context)
        context *= 2
    return contexts


def retrieval_rows(found: AnsweredPair, tasks: Sequence[str]) -> Rows:
    """Both models' accuracy for each task, context and depth."""
    rows = []
    for task in tasks:
        metric = found.pairs[task][0][0]["metrics"][0]
        cells: dict[tuple[int, float | None], list[tuple[float, float]]] = {}
        for teacher, student in found.pairs[task]:
            place = teacher["doc"]["context"], teacher["doc"]["depth"]
            cells.setdefault(place, []).append((teacher[metric], student[metric]))
        for (context, depth), values in cells.items():
            of_teacher, of_student = (sum(side) / len(values) for side in zip(*values))
            row = {"task": task, "context": context, "depth": depth, "n": len(values)}
            rows.append({**row, "teacher": of_teacher, "student": of_student})
    return rows
