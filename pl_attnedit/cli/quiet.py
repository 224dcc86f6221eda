"""Keeps the terminal for our own lines: phases, progress, results."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

from tqdm import tqdm
from transformers.utils import logging as transformers_logging

# What Lightning says at every start or end, none of which a user can act on.
_LIGHTNING = (
    "GPU available",
    "TPU available",
    "HPU available",
    "\U0001f4a1",
    "`Trainer.",
    "`weights_only` was",
    "LOCAL_RANK",
    "Seed set",
)
_LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.pytorch.trainer.connectors.checkpoint_connector",
    "lightning.fabric.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
)
_WARNINGS = (
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated",
    r".*module\(s\) in eval mode at the start of training",  # the teacher, on purpose
    r".*does not have many workers",  # batches are read from memory
    r".*The `srun` command is available",
    r"LightningCLI's args parameter is intended",  # we are the command line
    r".*You have overridden `on_before_batch_transfer`",  # stage 2 does so, and no data module of ours
    r".*Trying to infer the `batch_size`",
)


def quiet() -> None:
    """Silences other libraries' progress bars and remarks; what a user can act on is left."""
    if tqdm.__init__.__name__ == "without_bars":  # done before in this process
        return
    unchanged = tqdm.__init__

    def without_bars(self: tqdm, *args: Any, **kwargs: Any) -> None:
        unchanged(self, *args, **{"disable": True, **kwargs})  # bars that are ours say `disable=` themselves

    tqdm.__init__ = without_bars
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for pattern in _WARNINGS:
        warnings.filterwarnings("ignore", pattern)
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_worth_reading)


def _worth_reading(record: logging.LogRecord) -> bool:
    return not record.getMessage().strip().startswith(_LIGHTNING)
