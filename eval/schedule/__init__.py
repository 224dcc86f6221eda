"""Evaluations and reports on a schedule."""

from pl_attnedit.moved import names_of

__getattr__ = names_of("pl_attnedit.eval.schedule.watch", "Schedule", "newest_checkpoint")
