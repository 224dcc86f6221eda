"""Where MLflow is, and a first contact with it that fails within seconds when nobody answers."""

from __future__ import annotations

import logging
import os
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

import requests
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from pl_attnedit.errors import UserError, invalid
from pl_attnedit.files import no_room

DEFAULT_TRACKING_URI = "sqlite:///mlflow.db"
EXPERIMENT = "pl_attnedit"

KIND_TAG = "pl_attnedit.kind"
PARENT_TAG = "mlflow.parentRunId"
# Where things are, as absolute paths; children do not inherit these.
STUDENT_TAG = "pl_attnedit.student"  # of a conversion: the folder of its saved student
STUDENT_FINGERPRINT_TAG = "pl_attnedit.student_fingerprint"
CHECKPOINTS_TAG = "pl_attnedit.checkpoints"  # of a training: the folder of its checkpoints
WORKING_FOLDER_TAG = "pl_attnedit.working_folder"  # where relative names in its settings begin

UNREACHABLE = (MlflowException, SQLAlchemyError, requests.RequestException, sqlite3.Error)
"""What MLflow's calls raise when a server or a database does not answer, beside `OSError`."""

_ALLOWED = "give http(s)://host:port of a running MLflow server, or sqlite:///file.db"

# MLflow's own defaults (120 s, seven retries with back-off) would hold a start up for many minutes. What is
# sent while training runs is repeated by ourselves, see `delivery`. A user's own settings win.
_HTTP_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}


def resolve_tracking_uri(tracking_uri: str | None = None) -> str:
    """The given URI, else the environment's ``MLFLOW_TRACKING_URI``, else ``sqlite:///mlflow.db`` (working folder).

    Folders (Lightning's default ``./mlruns``) are refused, because MLflow >= 3.17 does.

    Raises:
        UserError: the URI is a folder, a ``file:`` URI, or empty.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", DEFAULT_TRACKING_URI) if tracking_uri is None else tracking_uri
    if ("://" not in uri and uri != "databricks") or uri.startswith("file:"):
        raise invalid("tracking_uri", uri, f"MLflow no longer writes to folders; {_ALLOWED}")
    return f"sqlite:///{os.path.expanduser(uri[10:])}" if uri.startswith("sqlite:///~") else uri


def database_exists(tracking_uri: str) -> bool:
    """Whether the file of an SQLite database is there; of other stores only a call can tell, so they are taken to be."""
    database = make_url(tracking_uri).database if tracking_uri.startswith("sqlite:") else None
    return database is None or database.startswith("file:") or Path(database).exists()


def connect(tracking_uri: str | None = None, *, create: bool = True) -> MlflowClient:
    """A client that has reached its server or opened its database once.

    Args:
        tracking_uri: see `resolve_tracking_uri`.
        create: make a database that does not exist yet; without it, that is an error.

    Raises:
        UserError: nobody answers, the answer is no MLflow server's, or the database cannot be opened. Takes at
            most about 20 s when packets get lost, and far less when the connection is refused.
    """
    uri = resolve_tracking_uri(tracking_uri)
    for name, value in _HTTP_DEFAULTS.items():
        os.environ.setdefault(name, value)
    for noisy in ("mlflow.store.db.utils", "alembic"):  # a dozen lines of INFO when the database is created
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        if uri.startswith("sqlite:"):
            _open_sqlite(uri, create)
        client = MlflowClient(uri)
        client.search_experiments(max_results=1)
    except (*UNREACHABLE, OSError, ImportError) as error:  # an import of a driver that is not installed
        if (message := no_room(error, uri)) is not None:
            raise UserError(f"tracking_uri: {message}") from error
        reason = str(error).splitlines()[0][:300]
        raise invalid("tracking_uri", uri, f"MLflow cannot be reached there ({reason}); {_ALLOWED}") from error
    return client


def _open_sqlite(uri: str, create: bool) -> None:
    """Fail at once where MLflow would retry for minutes: not a database, or a place that cannot be written."""
    database = make_url(uri).database
    if not database or database == ":memory:":
        raise UserError(f"tracking_uri = {uri!r}: name a database file, e.g. {DEFAULT_TRACKING_URI}")
    file = Path(database)
    own_kind = database.startswith("file:")  # SQLite's own kind of address
    if not own_kind:
        if not create and not (file.exists() and file.stat().st_size):
            raise UserError(f"tracking_uri = {uri!r}: there is no {database} here; nothing has been tracked in it yet")
        if not file.exists():
            _make_sqlite(uri, file)
    with closing(sqlite3.connect(database, timeout=10, uri=own_kind)) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if (tables or not create) and "experiments" not in tables:  # MLflow would put its tables beside what is there
        raise UserError(f"tracking_uri = {uri!r}: {database} is not a database of MLflow")
    if not os.access(database, os.W_OK):
        raise PermissionError(f"{database} is not writable")


def _make_sqlite(uri: str, final: Path) -> None:
    """MLflow's tables in a file beside it, which then gets its name: neither a kill nor a second process meanwhile leaves or
    finds a database that is half made."""
    final.parent.mkdir(parents=True, exist_ok=True)
    # MLflow keeps the file open, which some file systems do not let be removed
    with tempfile.TemporaryDirectory(prefix=".mlflow.", dir=final.parent, ignore_cleanup_errors=True) as folder:
        new = Path(folder) / final.name
        address = make_url(uri).set(database=str(new)).render_as_string(hide_password=False)
        MlflowClient(address).search_experiments(max_results=1)
        try:
            os.link(new, final)  # unlike a rename, not over that of a process that was quicker
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            if not final.exists():
                os.replace(new, final)
