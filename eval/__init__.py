"""Evaluation of conversions: lm-eval on teacher and student, statistics, comparison, report.

The modules are imported one by one, so that comparing and reporting do not wait seconds for lm-eval's import.
"""
