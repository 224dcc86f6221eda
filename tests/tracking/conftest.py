"""Fixtures that take seconds to make, and are shared."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tracking_helpers import MlflowServer

from pl_attnedit.tracking import connect


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("mlflow_server"))
    server.start()
    server.wait()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URI of a sqlite database; creating the tables takes seconds, so the tests share it."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow_db')}/mlflow.db"
    connect(uri)
    return uri
