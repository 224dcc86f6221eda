"""A checkpoint as a folder of shards: all processes write it together, and any number of processes can read it.

The folder holds the tensors of model and optimizers in the format of torch.distributed.checkpoint (DCP), and everything else
in `meta.pt`. DCP's own `async_save` needs a second process group (gloo). Here only the writing runs in the background; all
communication uses the training's process group, when the caller asks for it.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from pl_attnedit.checkpoints.disk import PARTIAL, could_not, fsync_folder, move, remove, save

REST = "meta.pt"  # Lightning's name for it
_DCP = "torch.distributed.checkpoint"
_KNOWN = {
    "pathlib": {"PosixPath"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    f"{_DCP}.filesystem": {"_StorageInfo"},
    f"{_DCP}.metadata": {
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
}


class ShardReader(dcp.FileSystemReader):
    """The tensors of a folder, by `state_dict/NAME` and `optimizer/INDEX/NUMBER/NAME` with a parameter's number."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.forms: dict[str, TensorStorageMetadata] = self.read_metadata().state_dict_metadata  # type: ignore[assignment]

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Without unpickling arbitrary objects, which DCP's own method does."""
        with (Path(self.path) / ".metadata").open("rb") as file:
            return _MetadataUnpickler(file).load()

    def check(self) -> None:
        """Raises `OSError` if a process's file is missing or too short."""
        ends: dict[str, int] = {}
        for info in self.read_metadata().storage_data.values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        for name, end in ends.items():
            if (Path(self.path) / name).stat().st_size < end:
                raise OSError(f"{name} is too short")

    def load(self, into: Mapping[str, Tensor]) -> None:
        """Fills tensors, sharded ones with this process's part; not a collective."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # DCP warns that this is not collective
            dcp.load(dict(into), storage_reader=self, no_dist=True)

    def fill(self, checkpoint: dict[str, Any]) -> None:
        """Adds whole tensors, in the places that they have in a checkpoint of one file."""
        found = {key: torch.empty(form.size, dtype=form.properties.dtype) for key, form in self.forms.items()}
        self.load(found)
        checkpoint["state_dict"] = {}
        for key, tensor in found.items():
            kind, _, name = key.partition("/")
            if kind == "state_dict":
                checkpoint["state_dict"][name] = tensor
            else:
                index, number, name = name.split("/")
                checkpoint["optimizer_states"][int(index)]["state"].setdefault(int(number), {})[name] = tensor


class _MetadataUnpickler(pickle.Unpickler):
    """Makes nothing but what DCP has put there."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _KNOWN.get(module, ()) or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} in it")


class ShardedWrite:
    """A folder, written by all processes on a file system that they share."""

    def __init__(self, checkpoint: dict[str, Any], path: Path) -> None:
        self.path, self.partial = path, path.with_name(path.name + PARTIAL)
        self.tensors, self.rest = _split(checkpoint)
        rank = dist.get_rank()
        failure = _attempt(lambda: _new_folder(self.partial)) if rank == 0 else None
        self.writer = dcp.FileSystemWriter(self.partial, per_thread_copy_ahead=0)
        self.writer.set_up_storage_writer(rank == 0)
        self.planner = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.planner.set_up_planner(self.tensors, None, rank == 0)
        everyones = of_all((failure, self.planner.create_local_plan()))
        _raise_first(self.path, [failure for failure, _ in everyones])
        plans, self.metadata = self.planner.create_global_plan(
            [plan for _, plan in everyones]
        )  # each for itself, alike
        self.plan = self.planner.finish_plan(self.writer.prepare_global_plan(plans)[rank])

    def run(self) -> Any:
        return self.writer.write_data(self.plan, self.planner).wait()

    def finish(self, part: Future[Any]) -> None:
        written: list[Any] = []
        failure = _attempt(lambda: written.extend(part.result()))
        everyones = of_all((failure, written))
        failures = [failure for failure, _ in everyones]
        if not any(failures):
            sealed = (
                _attempt(lambda: self._seal([results for _, results in everyones])) if dist.get_rank() == 0 else None
            )
            failures = of_all(sealed)
        if any(failures) and dist.get_rank() == 0:
            remove(self.partial)
        _raise_first(self.path, failures)

    def _seal(self, results: list[Any]) -> None:
        self.writer.finish(self.metadata, results)
        save(self.rest, self.partial / REST)
        try:
            ShardReader(self.partial).check()
        except OSError as error:
            raise OSError(f"{error}: all processes must see the same folder") from error
        fsync_folder(self.partial)
        move(self.partial, self.path)


def _split(checkpoint: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of model and optimizers by their names in the folder, and everything else."""
    rest = {name: value for name, value in checkpoint.items() if name not in ("state_dict", "optimizer_states")}
    tensors = {f"state_dict/{name}": value for name, value in checkpoint["state_dict"].items()}
    rest["optimizer_states"] = []
    for index, saved in enumerate(checkpoint.get("optimizer_states", [])):
        others: dict[int, dict[str, Any]] = {}
        for number, values in saved["state"].items():
            is_tensor = {name: isinstance(value, Tensor) for name, value in values.items()}
            tensors |= {f"optimizer/{index}/{number}/{name}": values[name] for name in values if is_tensor[name]}
            others[number] = {name: values[name] for name in values if not is_tensor[name]}
        rest["optimizer_states"].append({**saved, "state": others})
    return tensors, rest


def _new_folder(path: Path) -> None:
    remove(path)
    path.mkdir(parents=True)


def of_all(value: Any) -> list[Any]:
    """Collective: the values of all processes, by rank."""
    values: list[Any] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _attempt(action: Callable[[], Any]) -> str | None:
    """The error, if any, as a value: it must reach the other processes instead of being raised."""
    try:
        action()
    except Exception as error:
        return str(error) or type(error).__name__
    return None


def _raise_first(path: Path, failures: list[str | None]) -> None:
    for failure in failures:
        if failure is not None:
            raise could_not(path, failure)
