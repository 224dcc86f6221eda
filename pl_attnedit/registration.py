"""Makes converted models known to transformers without importing torch, which takes seconds.

When transformers first looks up the type of a converted model, `pl_attnedit.modeling.hf` makes and registers its classes.
transformers has no such hook, so its table of registered types is replaced by one that looks here first: at once where
transformers has made the table already, else as soon as it has.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

EDITED_PREFIX = "attnedit_"  # model type of a converted model = this + the teacher's
TABLE = "transformers.models.auto.configuration_auto"


def register_when_used() -> None:
    """Whether transformers is imported before or after."""
    if TABLE in sys.modules:
        _replace_table(sys.modules[TABLE])
    else:
        sys.meta_path.insert(0, _AfterImport())


class _RegisteredTypes(dict[str, Any]):
    def __contains__(self, model_type: object) -> bool:
        family = str(model_type).removeprefix(EDITED_PREFIX)
        known = super().__contains__(model_type)
        if not known and family != model_type and family in sys.modules[TABLE].CONFIG_MAPPING_NAMES:
            import_module("pl_attnedit.modeling.hf").edited_classes(family)
            return super().__contains__(model_type)
        return known


def _replace_table(auto: Any) -> None:
    auto.CONFIG_MAPPING._extra_content = _RegisteredTypes(auto.CONFIG_MAPPING._extra_content)


class _AfterImport(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name == TABLE else None
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_replace(module: ModuleType) -> None:
                run(module)
                _replace_table(module)

            spec.loader.exec_module = run_and_replace  # type: ignore[method-assign]
        return spec
