"""Serving converted models with vLLM: a plugin that vLLM finds by its entry point `vllm.general_plugins`.

`vllm serve STUDENT`, `LLM(...)` and `lm_eval --model vllm` take a converted model's folder as they take any other. The
models are the family's own vLLM classes with the attention of the edited layers swapped, as in `pl_attnedit.modeling.hf`.
Importing this package does not import vLLM, whose own interfaces are used in `layers`, `paged_backend`, `kv_cache` and
`models` alone.
"""

from __future__ import annotations

import logging

VERSIONS = ">=0.32,<0.33"  # of vLLM; what tests/serving was run with


def register() -> None:
    """Called by vLLM in each of its processes, perhaps more than once: makes the converted models known to it."""
    import vllm
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    from pl_attnedit.modeling.hf import edited_classes
    from pl_attnedit.serving.checks import SERVED

    if Version(vllm.__version__).base_version not in SpecifierSet(VERSIONS):
        logging.getLogger("vllm.pl_attnedit").warning(
            "pl_attnedit serves converted models with vLLM %s; this is %s, with which they are not served",
            VERSIONS,
            vllm.__version__,
        )
        return
    for family in SERVED:
        model = edited_classes(family)[1]
        vllm.ModelRegistry.register_model(model.__name__, f"pl_attnedit.serving.models:{model.__name__}")
