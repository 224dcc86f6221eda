"""Checkpoints on the disk: whole or not there, as one file or as shards."""

from pl_attnedit.moved import names_of

__getattr__ = names_of("pl_attnedit.checkpoints.io", "AtomicCheckpointIO", "read_checkpoint", "use_atomic_files")
