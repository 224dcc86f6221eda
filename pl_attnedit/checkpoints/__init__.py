"""Checkpoints on the disk: whole or not there, as one file or as shards."""
