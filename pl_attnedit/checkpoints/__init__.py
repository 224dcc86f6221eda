"""Checkpoints on disk, as one file or as shards: complete or absent, never partial."""

from pl_attnedit.moved import names_of

__getattr__ = names_of("pl_attnedit.checkpoints.io", "AtomicCheckpointIO", "read_checkpoint", "use_atomic_files")
