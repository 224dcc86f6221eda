"""Modules under the names that they had before they moved."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# below `pl_attnedit.`, by folder; a module whose old name a package has now is not among them
_MOVED = {
    "attention": {
        **{"window_cache": "gate_swa.cache", "mla_init": "mla.calibrated", "plain_svd": "mla.plain_svd"},
        **{"npu_attention": "kernels.npu", "windowed": "kernels.windowed", "autocast": "kernels.autocast"},
        "calibration": "statistics",
    },
    "distillation": {
        **{"base": "stage", "layerwise": "stage1", "model": "stage2", "step_graph": "engine.cuda_graph"},
        **{"pairs": "engine.pairs", "local": "engine.local_gradients", "sharding": "engine.sharding"},
        "forward_check": "engine.forward_check",
    },
    "eval": {
        **{name: f"fidelity.{name}" for name in ("by_position", "continuations", "generations")},
        **{name: f"harness.{name}" for name in ("answers", "language_model", "retrieval", "suites", "tasks")},
        **{name: f"report.{name}" for name in ("card", "charts", "compare", "formatting")},
        **{f"report_{name}": f"report.{name}" for name in ("data", "figures", "scales", "tables")},
        **{"report_json": "report.as_json", "report_markdown": "report.as_markdown", "schedule_jobs": "schedule.jobs"},
        "sensitivity": "fidelity.untrained",
    },
    "modeling": {"calibrate": "calibration", "sensitivity": "ranking"},
    "teachers": {
        **{"source": "sources.resolve", "checks": "sources.checks"},
        **{"gguf_file": "sources.gguf", "gguf_tokenizer": "sources.gguf_tokenizer"},
    },
}
_LOOSE = {
    **{name: f"conversion.{name}" for name in ("doctor", "dry_run", "recipe", "run_folder", "study")},
    **{"recipe_checks": "conversion.checks", "checkpoint_disk": "checkpoints.disk"},
    **{"checkpoint_shards": "checkpoints.shards", "trained_on": "modeling.trained_on"},
    "eval.bench.shapes": "shapes",
}
MOVED = {f"pl_attnedit.{old}": f"pl_attnedit.{new}" for old, new in _LOOSE.items()} | {
    f"pl_attnedit.{folder}.{old}": f"pl_attnedit.{folder}.{new}"
    for folder, names in _MOVED.items()
    for old, new in names.items()
}


def names_of(module: str, *names: str) -> Callable[[str], Any]:
    """`__getattr__` of a package that was a module with these names, which `module` has now and is slow to import."""

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module.rpartition('.')[0]!r} has no attribute {name!r}")
        return getattr(import_module(module), name)

    return find


class _Moved(MetaPathFinder, Loader):
    """Asked where nothing is found under a name."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = import_module(MOVED[module.__name__])


def find_moved() -> None:
    """Lets imports of old module names find the new ones."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
