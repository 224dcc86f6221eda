"""Serving converted models with vLLM: a plugin that vLLM finds by its entry point `vllm.general_plugins`.

`vllm serve STUDENT`, `LLM(...)` and `lm_eval --model vllm` take a converted model's folder as they take any other. The
models are the family's own vLLM classes with the attention of the edited layers swapped, as in `pl_attnedit.modeling.hf`.
Importing this package does not import vLLM, whose own interfaces are used in `layers`, `kv_cache`, `backends`,
`paged_backend`, `flash_backend`, `state_backend` and `models` alone.
"""

from __future__ import annotations

import logging

VERSIONS = ("0.26", "0.32")  # of vLLM; what was run: 0.26 on an NVIDIA GPU, both on a CPU


def register() -> None:
    """Called by vLLM in each of its processes, perhaps more than once: makes the converted models known to it."""
    import vllm
    from packaging.version import Version

    from pl_attnedit.modeling.hf import edited_classes
    from pl_attnedit.serving.checks import SERVED

    if ".".join(map(str, Version(vllm.__version__).release[:2])) not in VERSIONS:
        logging.getLogger("vllm.pl_attnedit").warning(
            "pl_attnedit serves converted models with vLLM %s; this is %s, with which they are not served",
            " and ".join(VERSIONS),
            vllm.__version__,
        )
        return
    for family in SERVED:
        model = edited_classes(family)[1]
        vllm.ModelRegistry.register_model(model.__name__, f"pl_attnedit.serving.models:{model.__name__}")
