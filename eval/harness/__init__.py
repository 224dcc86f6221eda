"""lm-eval on teacher and student: suites, tasks, answers that are kept, and their paired comparison."""
