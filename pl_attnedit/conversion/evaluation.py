"""What the finished student is asked, and what it caches, beside its teacher."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from pl_attnedit.conversion.recipe import Recipe
from pl_attnedit.data import TextDataModule
from pl_attnedit.eval.fidelity.continuations import greedy_continuations
from pl_attnedit.eval.harness.paired import EvaluationResult, evaluate_pair
from pl_attnedit.eval.harness.tasks import OFFLINE_TASKS, build_offline_tasks
from pl_attnedit.eval.students import load_pair
from pl_attnedit.modeling.edit import read_config
from pl_attnedit.modeling.kv import held_bytes, kv_context, on_meta
from pl_attnedit.teachers.sources.fingerprint import model_fingerprint
from pl_attnedit.teachers.sources.resolve import teacher_config, teacher_fingerprint


def build_tasks(recipe: Recipe, data: TextDataModule, folder: Path) -> str:
    """lm-eval tasks out of held-out text, in the run folder; returns their folder."""
    options = recipe.evaluation
    tasks = build_offline_tasks(
        data.held_out_texts(),
        folder / "eval" / "tasks",
        n_documents=options.documents,
        n_cloze=options.cloze,
        seed=recipe.seed,
        tokenizer=data.tokenizer,
        max_length=data.seq_len,
    )
    return str(tasks)


def check_tasks(recipe: Recipe, data: TextDataModule) -> None:
    """`UserError` for text, or sequences, too short for them."""
    with TemporaryDirectory() as folder:
        build_tasks(recipe, data, Path(folder))


def measure_cache(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Cached bytes per token of teacher and student on their real caches, both in the student's dtype."""
    config = read_config(folder / "student")
    teacher, student = (on_meta(each, config.dtype) for each in (teacher_config(recipe.teacher), config))
    context = kv_context(student)
    return {
        "kv_context": context,
        "kv_bytes_per_token_teacher": sum(held_bytes(teacher, context)) / context,
        "kv_bytes_per_token_student": sum(held_bytes(student, context)) / context,
        "pattern": student.edit_plan.pattern,
    }


def evaluate_student(
    recipe: Recipe, folder: Path, max_length: int, device: torch.device
) -> tuple[EvaluationResult, list[dict[str, Any]] | None]:
    """What teacher and student answer to the tasks of `build_tasks`, and how they go on with some prompts.

    Args:
        folder: the run folder.
        max_length: longest window in tokens.
        device: on which both are.
    """
    teacher, student, tokenizer = load_pair(folder / "student", recipe.teacher, device=device)
    result = evaluate_pair(
        teacher,
        student,
        tokenizer,
        OFFLINE_TASKS,
        task_folder=folder / "eval" / "tasks",
        max_length=max_length,
        out_dir=folder / "eval",
        teacher_fingerprint=teacher_fingerprint(recipe.teacher),
        student_fingerprint=model_fingerprint(folder / "student"),
    )
    tokens = recipe.evaluation.continuation_tokens
    texts = greedy_continuations(teacher, student, tokenizer, max_new_tokens=tokens) if tokens else None
    return result, texts
