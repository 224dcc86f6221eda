"""Configs as plain data, for commands that need only a part of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pl_attnedit.errors import invalid


def read_config(path: str) -> dict[str, Any]:
    """A recipe, or the config of a stage."""
    try:
        content = yaml.safe_load(Path(path).read_text("utf-8"))
    except OSError as error:
        raise invalid("config", path, f"cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise invalid("config", path, f"is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise invalid("config", path, "must be a recipe or the config of a stage")
    return content
