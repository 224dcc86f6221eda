"""Fingerprints of models: hashes of the content of their files."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pl_attnedit.cache import build_once, cache_root

_DIGEST_CACHED_FROM = 64 * 2**20  # bytes; smaller files are hashed faster than their cached digest is looked up
# Facts about the writer of a config, not about the model.
_CONFIG_NOISE = {"transformers_version", "_name_or_path", "_model_name_or_path"}


def model_fingerprint(path: str | Path) -> str:
    """Hex SHA-256 that identifies a teacher or a student. For a folder it covers weights and config, for a checkpoint
    (.ckpt, a file or a folder of shards) the content of its files."""
    path = Path(path)
    if path.suffix == ".ckpt" and not path.is_dir():
        return file_sha256(path)
    if path.suffix == ".ckpt":
        return hashlib.sha256(" ".join(file_sha256(file) for file in sorted(path.iterdir())).encode()).hexdigest()
    config = json.loads((path / "config.json").read_text("utf-8"))
    for key in _CONFIG_NOISE & config.keys():
        del config[key]
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    with ThreadPoolExecutor() as threads:
        for of_file in threads.map(file_sha256, sorted(path.glob("*.safetensors"))):
            digest.update(of_file.encode())
    return digest.hexdigest()


def file_sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file's content; kept in the cache folder for a large file that has not changed since."""
    path = Path(path).resolve()
    status = path.stat()
    if status.st_size < _DIGEST_CACHED_FROM:
        return sha256_of(path)
    changed = f"{status.st_mtime_ns}|{status.st_ctime_ns}"  # a copied file may keep the old modification time
    key = hashlib.sha256(f"{path}|{status.st_size}|{changed}".encode()).hexdigest()
    cached = build_once(cache_root() / "digests" / key, lambda part: _write(part / "sha256", sha256_of(path)))
    return (cached / "sha256").read_text("ascii")


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


def _write(path: Path, text: str) -> None:
    path.write_text(text, "ascii")
