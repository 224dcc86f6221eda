"""Where things are that MLflow knows by absolute paths, after the folder of a project was renamed, moved or copied.

MLflow keeps such paths of artifacts, our tags those of students and checkpoints. They began in the working folder, where the
database is by default; so what lies beside the database as it lay beside that one is meant, and the old place is left alone.
"""

from __future__ import annotations

import os
from pathlib import Path

from mlflow.entities import Run
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from sqlalchemy.engine import make_url

from pl_attnedit.tracking.client import WORKING_FOLDER_TAG

ARTIFACTS = "/mlruns/"  # MLflow's own folder for them, in the working folder


def artifacts(run: Run, tracking_uri: str) -> ArtifactRepository:
    """The artifacts of a run."""
    place = run.info.artifact_uri
    before, kept_by_mlflow, rest = place.rpartition(ARTIFACTS)
    home = _database_folder(tracking_uri)
    if home is not None and kept_by_mlflow and "://" not in before:
        here = home / ARTIFACTS.strip("/") / rest.split("/")[0]  # of the run's experiment
        if here.is_dir() or not os.path.isdir(before):
            place = str(here.parent / rest)
    return get_artifact_repository(place, tracking_uri=tracking_uri)


def present(path: str | Path, run: Run, tracking_uri: str) -> Path:
    """Where a folder or file is now that a run's tags or settings name; where it was, if it is nowhere."""
    tags, home = run.data.tags, _database_folder(tracking_uri)
    before = tags.get(WORKING_FOLDER_TAG) or run.info.artifact_uri.rpartition(ARTIFACTS)[0] or "/"
    recorded = Path(before, path)
    if not recorded.is_relative_to(before):
        return recorded
    moved = (home or Path.cwd()) / recorded.relative_to(before)
    places = [recorded, moved] if home is None else [moved, recorded]
    return next((place for place in places if place.exists()), recorded)


def _database_folder(tracking_uri: str) -> Path | None:
    """Of an SQLite file; None for a server."""
    if not tracking_uri.startswith("sqlite:"):
        return None
    return Path(make_url(tracking_uri).database or "").absolute().parent
