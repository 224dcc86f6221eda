"""Evaluations and reports on a schedule."""
