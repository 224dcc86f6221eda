"""The student as one of MLflow's logged models: what it takes and gives, its size, its figures, and where it lies.

MLflow gets a description of about a kilobyte, the file MLmodel, and no weights: they stay in the run folder, which the tags
and parameters name. So `pl_attnedit.load` opens the folder; `mlflow.transformers.load_model` has nothing to load.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow.entities import LoggedModel, LoggedModelOutput, Run
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_IS_EXTERNAL, MLFLOW_MODEL_VERSIONS

from pl_attnedit.errors import invalid
from pl_attnedit.tracking.client import STUDENT_FINGERPRINT_TAG, STUDENT_TAG
from pl_attnedit.tracking.places import repository

MODEL_TYPE = "causal-lm"
Student = dict[str, Any]
"""A student as the journal keeps it."""


def student_model(
    folder: Path, name: str, fingerprint: str, vocabulary: int, params: Mapping[str, Any], register: str | None = None
) -> Student:
    """A saved student as `TrackedRun.log_model` takes it.

    Args:
        folder: with its safetensors.
        name: of the model.
        fingerprint: of the student; a run has one model of it, however often it is logged.
        vocabulary: tokens that its logits are about.
        params: what a reader wants to know of it; its size is added.
        register: name in the model registry under which it becomes a version.
    """
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {
        "name": "".join("_" if letter in "/:.%\"'" else letter for letter in name),
        "params": {key: str(value) for key, value in {**params, "size_bytes": size}.items()},
        "tags": {STUDENT_TAG: str(folder.absolute()), STUDENT_FINGERPRINT_TAG: fingerprint},
        "size": size,
        "vocabulary": vocabulary,
        "register": register,
    }


def check_registered_name(name: str | None) -> None:
    """Raises `UserError` where MLflow's registry would refuse the name, hours later."""
    if name is not None and (not name.strip(". ") or set(name) & set("/:'\"")):
        raise invalid("register", name, "must be a name without / : and quotes")


def model_of(run: Run) -> str | None:
    """The id of the model that a run has logged."""
    outputs = run.outputs.model_outputs if run.outputs else []
    return outputs[-1].model_id if outputs else None


def send_model(client: MlflowClient, run_id: str, student: Student) -> None:
    """Enter the student, once however often it is sent: a process may be killed after each of these steps."""
    run = client.get_run(run_id)
    model = _known(client, run, student) or _create(client, run, student)
    if model.status != "READY":
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "MLmodel"
            _description(model, student).save(file)
            repository(model.artifact_location, client.tracking_uri).log_artifact(str(file))
        client.finalize_logged_model(model.model_id, "READY")
    if model_of(run) != model.model_id:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
    if student["register"] is not None:
        _register(client, run_id, model, student["register"])


def _known(client: MlflowClient, run: Run, student: Student) -> LoggedModel | None:
    """The model, where an earlier attempt has created it."""
    try:
        found = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'")
    except MlflowException as error:
        if error.error_code != "ENDPOINT_NOT_FOUND":
            raise
        raise MlflowException(
            "this server is older than MLflow 3 and has no models", INVALID_PARAMETER_VALUE
        ) from error
    fingerprint = student["tags"][STUDENT_FINGERPRINT_TAG]
    return next((each for each in found if each.tags.get(STUDENT_FINGERPRINT_TAG) == fingerprint), None)


def _create(client: MlflowClient, run: Run, student: Student) -> LoggedModel:
    return client.create_logged_model(
        run.info.experiment_id,
        name=student["name"],
        source_run_id=run.info.run_id,
        tags={**student["tags"], MLFLOW_MODEL_IS_EXTERNAL: "true"},
        params=student["params"],
        model_type=MODEL_TYPE,
    )


def _description(model: LoggedModel, student: Student) -> Any:
    """The file MLmodel: (batch, tokens) ids and mask in, (batch, tokens, vocabulary) logits out."""
    import numpy as np  # with mlflow.models a second that a process without students need not wait
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    names = ("input_ids", "attention_mask")
    inputs = Schema([TensorSpec(np.dtype("int64"), (-1, -1), name) for name in names])
    outputs = Schema([TensorSpec(np.dtype("float32"), (-1, -1, student["vocabulary"]), "logits")])
    return Model(
        artifact_path=model.artifact_location,
        run_id=model.source_run_id,
        model_id=model.model_id,
        model_uuid=model.model_id,
        model_size_bytes=student["size"],
        signature=ModelSignature(inputs, outputs),
        metadata={MLFLOW_MODEL_IS_EXTERNAL: True, **student["tags"]},
    )


def _register(client: MlflowClient, run_id: str, model: LoggedModel, name: str) -> None:
    """A version of the registered model `name`; its source is MLflow's description of the model."""
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    found = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    version = next((each for each in found if each.source == model.artifact_location), None)
    if version is None:
        version = client.create_model_version(
            name,
            model.artifact_location,
            run_id=run_id,
            model_id=model.model_id,
            tags=model.tags,
            description=f"Weights, tokenizer and model card: {model.tags[STUDENT_TAG]}",
            await_creation_for=0,
        )
    # A server does this itself. It is what links model and version in the user interface.
    known = json.loads(client.get_logged_model(model.model_id).tags.get(MLFLOW_MODEL_VERSIONS, "[]"))
    this = {"name": name, "version": version.version}
    if not any(each["name"] == name and str(each["version"]) == str(version.version) for each in known):
        client.set_logged_model_tags(model.model_id, {MLFLOW_MODEL_VERSIONS: json.dumps([*known, this])})
