"""Students out of checkpoints are the students that were trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_stages import (  # noqa: F401
    LATENT,
    WINDOW,
    cache_of_tests,
    make_data,
    make_stage1,
    make_stage2,
    session_cache,
    teacher_folder,
    tiny_corpus,
    tiny_tokenizer,
)

from pl_attnedit.callbacks import ResumableCheckpoint
from pl_attnedit.errors import UserError
from pl_attnedit.eval.students import load_student
