"""What a conversion cost and gained: summary.json, and the figures, the model and the tags of its MLflow parent run.

The parent alone says which of several conversions is best, in MLflow's own tables and charts; docs has the table of names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pl_attnedit.conversion.recipe import Recipe, phases_text
from pl_attnedit.eval.evaluation_log import compared_metrics
from pl_attnedit.modeling.edit import read_config
from pl_attnedit.teachers.sources.fingerprint import model_fingerprint
from pl_attnedit.tracking import TrackedRun, student_model
from pl_attnedit.tracking.client import STUDENT_FINGERPRINT_TAG, STUDENT_TAG


def summarise(recipe: Recipe, targets: Any, progress: Mapping[str, Any], run_id: str) -> dict[str, Any]:
    """The content of summary.json.

    Args:
        recipe: the recipe.
        targets: of the resolved recipe as plain data.
        progress: what each phase has found.
        run_id: the parent run.
    """
    before, after1, after2, kv = (progress[phase] for phase in ("init", "stage1", "stage2", "kv"))
    teacher, student = kv["kv_bytes_per_token_teacher"], kv["kv_bytes_per_token_student"]
    speeds = {f"tokens_per_s_{stage}": progress[stage].get("tokens_per_s") for stage in ("stage1", "stage2")}
    return {
        "recipe": recipe.name,
        "run_id": run_id,
        "teacher": recipe.teacher,
        "targets": targets,
        "pattern": kv["pattern"],
        "phases": phases_text(recipe),
        "tokens_stage1": after1["tokens"],
        "tokens_stage2": after2["tokens"],
        **{name: speed for name, speed in speeds.items() if speed is not None},
        "kl_before": before["val/kl"],
        "kl_after_stage1": after1["val/kl"],
        "kl_after_stage2": after2["val/kl"],
        "top1_after": after2["val/top1"],
        "ppl_teacher": after2["val/ppl_teacher"],
        "ppl_student": after2["val/ppl_student"],
        "kv_budget": student / teacher,
        "kv_context": kv["kv_context"],
        "kv_bytes_per_token_teacher": teacher,
        "kv_bytes_per_token_student": student,
        "wall_seconds": progress["wall_seconds"],
        "peak_rss_bytes": progress["peak_rss_bytes"],
    }


def log_summary(parent: TrackedRun, summary: Mapping[str, Any], evaluation: list[dict[str, Any]], file: Path) -> None:
    """Logs the summary's numbers and the differences that the evaluation found, as figures of the student, too.

    Args:
        parent: the conversion's run.
        summary: the content of `file`, summary.json.
        evaluation: rows of results.json.
    """
    parent.set_tags({"pattern": summary["pattern"], "phases": summary["phases"]})
    numbers = {name: value for name, value in summary.items() if isinstance(value, int | float)}
    parent.log_metrics(numbers | compared_metrics({"tasks": evaluation}), of_model=True)
    parent.log_file(file)


def log_student(parent: TrackedRun, folder: Path, recipe: Recipe, pattern: str) -> None:
    """Names the saved student in MLflow: as the run's model, registered where the recipe says so, and by tags."""
    folder, config = folder.resolve(), read_config(folder)
    fingerprint = model_fingerprint(folder)
    parent.set_tags({STUDENT_TAG: folder, STUDENT_FINGERPRINT_TAG: fingerprint})
    params = {
        "teacher": recipe.teacher,
        "targets": recipe.targets,
        "pattern": pattern,
        "dtype": str(config.dtype).removeprefix("torch."),
        "folder": folder,
    }
    parent.log_model(student_model(folder, recipe.name, fingerprint, config.vocab_size, params, recipe.register))
