"""Benchmarks: one file each, each a function that returns plain data."""
