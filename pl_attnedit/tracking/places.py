"""Where things are that MLflow knows by absolute paths, after the folder of a project was renamed, moved or copied.

MLflow keeps such paths of artifacts, our tags those of students and checkpoints. All began in the working folder, where the
database is by default; what lies to the database as it lay to that one is meant then, and the old place is left alone.
"""

from __future__ import annotations

from pathlib import Path

from mlflow.entities import Run
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from sqlalchemy.engine import make_url

from pl_attnedit.tracking.client import WORKING_FOLDER_TAG

ARTIFACTS = "/mlruns/"  # MLflow's own folder for them, in the working folder


def artifacts(run: Run, tracking_uri: str) -> ArtifactRepository:
    """The artifacts of a run."""
    return repository(run.info.artifact_uri, tracking_uri)


def repository(place: str, tracking_uri: str) -> ArtifactRepository:
    """The artifacts at the place that MLflow has recorded of a run or a model."""
    before, in_working_folder, rest = place.rpartition(ARTIFACTS)
    if tracking_uri.startswith("sqlite:") and in_working_folder and "://" not in before:
        place = f"{_now(before, tracking_uri)}{ARTIFACTS}{rest}"
    return get_artifact_repository(place, tracking_uri=tracking_uri)


def present(path: str | Path, run: Run, tracking_uri: str) -> Path:
    """Where a folder or file is now that a run's tags name; where it was, if it is nowhere."""
    before = run.data.tags.get(WORKING_FOLDER_TAG) or run.info.artifact_uri.rpartition(ARTIFACTS)[0] or "/"
    recorded = Path(before, path)
    if not recorded.is_relative_to(before):
        return recorded
    moved = _now(before, tracking_uri) / recorded.relative_to(before)
    return moved if moved.exists() else recorded


def _now(before: str, tracking_uri: str) -> Path:
    """Where the working folder is now. A database that is not the only one of its name is that of a copy."""
    if not tracking_uri.startswith("sqlite:"):
        return Path(before) if Path(before).is_dir() else Path.cwd()
    database = Path(make_url(tracking_uri).database or "").absolute()
    stayed = Path(before).is_dir() and not Path(before, database.name).exists()
    return Path(before) if stayed else database.parent
