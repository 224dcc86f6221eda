"""The model card of a converted model: README.md beside its weights, as the Hugging Face hub shows it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from pl_attnedit.errors import UserError
from pl_attnedit.eval.report.formatting import (
    context_length,
    count,
    duration,
    kl,
    markdown_table,
    percent,
    points_or_value,
    significant,
    value_of,
)
from pl_attnedit.files import write_atomically
from pl_attnedit.shapes import SHAPE_PREFIX
from pl_attnedit.teachers.sources.gguf_parts import PACKAGE_PREFIX, files_in_package
from pl_attnedit.teachers.sources.resolve import TEACHER_SOURCES, hub_snapshot

TARGET_NAMES = {"gate_swa": "GateSWA", "gated_deltanet": "Gated DeltaNet", "mla": "MLA"}


def write_card(
    folder: str | Path, summary: Mapping[str, Any], recipe: Mapping[str, Any], evaluation: Sequence[Mapping[str, Any]]
) -> Path:
    """Writes README.md into the folder of a saved student.

    Args:
        summary: summary.json of the conversion.
        recipe: the resolved recipe as plain data.
        evaluation: rows of results.json, `TaskDifference` as mappings.
    """
    teacher = str(summary["teacher"])
    data = ModelCardData(
        license=teacher_licence(teacher),
        base_model=teacher if is_hub_name(teacher) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["attention-editing", *_targets(summary)],
    )
    parts = [
        f"# {summary['recipe']}",
        _introduction(summary, data.license),
        _figures(summary),
        _evaluation(evaluation),
        _use(Path(folder)),
        "## How it was made\n\n```yaml\n" + yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True) + "```",
        f"MLflow run `{summary['run_id']}`; {duration(summary['wall_seconds'])} of wall time.",
    ]
    content = f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"
    return write_atomically(Path(folder) / "README.md", str(ModelCard(content)))


def is_hub_name(teacher: str) -> bool:
    """Whether a teacher's name is one on the Hugging Face hub."""
    return not (
        teacher.startswith((PACKAGE_PREFIX, SHAPE_PREFIX, ".", "~", "/"))
        or teacher.endswith(".gguf")
        or Path(teacher).is_dir()
    )


def teacher_licence(teacher: str) -> str | None:
    """The teacher's licence as its own card or GGUF header states it; None where neither does."""
    try:
        if teacher.startswith(PACKAGE_PREFIX) or teacher.endswith(".gguf"):
            files = files_in_package(teacher) if teacher.startswith(PACKAGE_PREFIX) else [Path(teacher).expanduser()]
            return _gguf_licence(files[0]) if files[0].suffix == ".gguf" else None  # a piece alone cannot be read
        folder = (
            hub_snapshot("teacher", teacher, ["README.md"], TEACHER_SOURCES)
            if is_hub_name(teacher)
            else Path(teacher).expanduser()
        )
    except UserError:  # the hub cannot be reached and has left no card here
        return None
    card = folder / "README.md"
    licence = ModelCard.load(card).data.get("license") if card.is_file() else None
    return licence if isinstance(licence, str) else None


def _gguf_licence(path: Path) -> str | None:
    from gguf import GGUFReader

    field = GGUFReader(path).fields.get("general.license")
    return None if field is None else str(field.contents())


def _targets(summary: Mapping[str, Any]) -> list[str]:
    targets = summary["targets"]
    return sorted({target["type"] for target in ([targets] if "type" in targets else targets.values())})


def _introduction(summary: Mapping[str, Any], licence: str | None) -> str:
    names = " and ".join(TARGET_NAMES.get(name, name) for name in _targets(summary))
    budget = summary["kv_bytes_per_token_student"] / summary["kv_bytes_per_token_teacher"]
    stated = f"The teacher's licence is {licence}." if licence else "The teacher states no licence where we looked."
    tokens = count(summary["tokens_stage1"] + summary["tokens_stage2"])
    phases = f" ({summary['phases']})" if summary.get("phases") else ""
    context = context_length(summary["kv_context"])
    return (
        f"`{summary['teacher']}` with its attention replaced by {names} (pattern `{summary['pattern']}`, F = the teacher's "
        f"own attention) and distilled from the original on {tokens} tokens{phases}. It caches {percent(budget)} of the "
        f"teacher's bytes at a context of {context}. {stated}"
    )


def _figures(summary: Mapping[str, Any]) -> str:
    rows = [
        ("KV cache, bytes per token: teacher", f"{summary['kv_bytes_per_token_teacher']:,.0f}"),
        ("KV cache, bytes per token: student", f"{summary['kv_bytes_per_token_student']:,.0f}"),
        ("KL to the teacher before training, nats per token", kl(summary["kl_before"])),
        (f"KL after stage 1 ({count(summary['tokens_stage1'])} tokens)", kl(summary["kl_after_stage1"])),
        (f"KL after stage 2 ({count(summary['tokens_stage2'])} tokens)", kl(summary["kl_after_stage2"])),
        ("Same most likely next token", percent(summary["top1_after"])),
        ("Perplexity: teacher", significant(summary["ppl_teacher"])),
        ("Perplexity: student", significant(summary["ppl_student"])),
    ]
    return "## Cost and quality\n\nOn held-out text of the training data.\n\n" + markdown_table(("", "value"), rows)


def _evaluation(evaluation: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for row in evaluation:
        metric = row["metric"]
        low, high = (points_or_value(metric, row[name]) for name in ("ci_low", "ci_high"))
        difference = f"{points_or_value(metric, row['difference'])} [{low}, {high}]"
        values = (value_of(metric, row["teacher"]), value_of(metric, row["student"]))
        rows.append((row["task"], metric, str(row["n"]), *values, difference))
    head = ("task", "metric", "n", "teacher", "student", "student - teacher [95% interval]")
    return (
        "## Evaluation\n\nTeacher and student answered the same samples; differences are paired (accuracies in points).\n\n"
        + markdown_table(head, rows)
    )


def _use(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text("utf-8")) if (folder / "config.json").is_file() else {}
    multimodal = "AutoModelForImageTextToText" in config.get("auto_map", {})
    model, reader = ("ImageTextToText", "Processor") if multimodal else ("CausalLM", "Tokenizer")
    return f"""## Use

```python
import pl_attnedit  # pip install pl_attnedit
from transformers import AutoModelFor{model}, Auto{reader}

model = AutoModelFor{model}.from_pretrained(FOLDER)
{reader.lower()} = Auto{reader}.from_pretrained(FOLDER)
```

Programs that do not import `pl_attnedit` load it with `trust_remote_code=True`, which runs only the import in
`load_with_pl_attnedit.py`: `lm_eval --model hf --model_args pretrained=FOLDER,trust_remote_code=True ...`"""
