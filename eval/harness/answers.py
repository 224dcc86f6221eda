"""One model's answers to lm-eval tasks: what is asked, how it is computed, and where it is kept.

Answers are kept in files named by what was asked of whom (`kept`), each either whole or not there: an evaluation that was
interrupted computes only what is missing, and a teacher's answers are computed once.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable
from transformers import PreTrainedModel

from pl_attnedit.cache import cache_root
from pl_attnedit.data.files import use_writable_cache
from pl_attnedit.errors import UserError, invalid
from pl_attnedit.eval.harness.language_model import SharedPrefixLM
from pl_attnedit.files import json_text, write_atomically

Sample = dict[str, Any]  # one of lm-eval's logged samples

# Raise it when models would be asked or scored differently.
VERSION = 1
# lm-eval's aggregations that have a paired comparison; others (F1, Matthews, BLEU ...) are no sum over samples.
COMPARABLE = ("mean", "perplexity", "weighted_perplexity", "bits_per_byte")


@dataclass(frozen=True)
class TaskRequest:
    """A task, tag or group of lm-eval.

    Args:
        name: as in lm-eval.
        folder: where its YAML lies; None is lm-eval's own library, whose data comes from the hub or its cache.
        num_fewshot: examples in the prompt; None is the task's own number.
        limit: only the first samples (of each task of a group).
    """

    name: str
    folder: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None


@dataclass(frozen=True)
class LoadedTask:
    """A task ready to be asked; `digest` identifies what is asked and how it is scored, wherever files lie."""

    task: Task
    limit: int | None
    digest: str

    @property
    def name(self) -> str:
        return str(self.task.task_name)

    @property
    def higher_is_better(self) -> dict[str, bool]:
        """By metric, those that can be compared in pairs."""
        better, found = self.task.higher_is_better(), {}
        for metric, aggregation in self.task.aggregation().items():
            if getattr(aggregation, "__name__", "") in COMPARABLE:
                found[metric] = better[metric]
        return found

    @property
    def not_compared(self) -> list[str]:
        return sorted(set(self.task.aggregation()) - set(self.higher_is_better))


def load_tasks(requests: Iterable[TaskRequest]) -> dict[str, list[LoadedTask]]:
    """The tasks behind each request, by the request's name; a group or tag stands for several.

    Raises:
        UserError: no such task, or its data is neither on this machine nor to be had from the hub.
    """
    # lm-eval reports every step it takes, and warns of defaults that are meant.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    managers: dict[Path | None, TaskManager] = {}
    found: dict[str, list[LoadedTask]] = {}
    for request in requests:
        name, folder = request.name, request.folder
        if request.limit is not None and request.limit < 1:
            raise invalid("limit", request.limit, "must be at least 1")
        if folder not in managers:
            # lm-eval's own library takes ten seconds to index
            managers[folder] = TaskManager(include_path=folder and str(folder), include_defaults=folder is None)
        known = managers[folder].all_tasks
        if name not in known:
            where = (
                f"one of {', '.join(known) or 'none'} in {folder}" if folder else "a task that `lm_eval ls tasks` lists"
            )
            raise invalid("tasks", name, f"must be {where}")
        tasks = _load(managers[folder], name, local=folder is not None)
        found[name] = [_prepare(task, request) for task in tasks]
    return found


def _load(manager: TaskManager, name: str, *, local: bool) -> list[Task]:
    use_writable_cache()
    try:
        return list(manager.load([name])["tasks"].values())
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        if local:
            raise invalid("tasks", name, f"cannot be loaded: {error}") from error
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"task {name}: lm-eval cannot load its data from the Hugging Face hub or its cache on this machine ({reason}). "
            "Run it where the hub can be reached, bring its cache folder (HF_HOME) along, or use the suite `offline`"
        ) from error


def _prepare(task: Task, request: TaskRequest) -> LoadedTask:
    """As lm-eval's own command line does it: a task's own 0 examples stay 0, the same seed chooses the examples."""
    own = task.get_config("num_fewshot")
    if own is None or (own != 0 and request.num_fewshot is not None):
        task.set_config("num_fewshot", request.num_fewshot or 0)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    config = {key: value for key, value in task.dump_config().items() if key != "dataset_kwargs"}  # paths, as is
    config["metadata"] = {key: value for key, value in (config.get("metadata") or {}).items() if key != "config_source"}
    asked = hashlib.sha256(_dumps([version("lm_eval"), config, request.limit]).encode())
    examples = task.fewshot_docs() if task.get_config("num_fewshot") else []
    for doc in itertools.chain(islice(task.eval_docs, request.limit), examples):
        asked.update(_dumps(doc).encode())
    return LoadedTask(task, request.limit, asked.hexdigest())


def circumstances(model: PreTrainedModel) -> dict[str, Any]:
    """What decides a model's figures besides its content and what it is asked; part of the key of all that is kept."""
    generation = model.generation_config
    return {
        "dtype": str(model.dtype),
        "device": model.device.type,
        "generation": None if generation is None else generation.to_diff_dict(),
        "versions": [VERSION, version("transformers")],
    }


def answers_folder() -> Path:
    """Where teachers' answers are kept, for all evaluations."""
    return cache_root() / "answers"


def digest(key: dict[str, Any]) -> str:
    """Hex SHA-256 of a key."""
    return hashlib.sha256(_dumps(key).encode()).hexdigest()


def kept(
    folder: Path | None, key: dict[str, Any], compute: Callable[[], dict[str, Any]]
) -> tuple[dict[str, Any], bool]:
    """What `compute` returns, as JSON data, and whether it was there before; None for a folder keeps nothing."""
    if folder is None:
        return json.loads(_dumps(compute())), False
    path = folder / f"{digest(key)[:32]}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8")), True
    text = _dumps({"key": key, **compute()})
    write_atomically(path, text)
    return json.loads(text), False


def answer(lm: SharedPrefixLM, task: LoadedTask) -> dict[str, Any]:
    """`samples` as lm-eval logs them, `seconds`, and `batch_size`, that of the end."""
    start = time.perf_counter()
    # `evaluate`, not `simple_evaluate`: the latter sets global seeds and spends seconds on describing the machine.
    results = evaluate(lm, {"tasks": {task.name: task.task}}, limit=task.limit, bootstrap_iters=0)
    assert results is not None, "only rank 0 evaluates"
    samples = results["samples"][task.name]
    return {"samples": samples, "seconds": round(time.perf_counter() - start, 2), "batch_size": int(lm.batch_size)}


@contextmanager
def evaluation_mode(*models: Any):
    """Module by module: a student in training shares frozen modules, which are not, with the teacher."""
    training = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def write_samples(out_dir: Path, name: str, task: str, samples: Sequence[Sample]) -> Path:
    """One jsonl per task and model."""
    return write_atomically(out_dir / f"samples_{task}_{name}.jsonl", "".join(_line(sample) for sample in samples))


def _line(value: Any) -> str:
    return json_text(value, indent=None, default=handle_non_serializable)


def _dumps(value: Any) -> str:
    return json.dumps(value, default=handle_non_serializable, ensure_ascii=False)
