"""lm-eval on teacher and student: suites, tasks, answers that are kept, and their paired comparison."""

from pl_attnedit.moved import names_of

__getattr__ = names_of(
    "pl_attnedit.eval.harness.paired",
    "AnsweredPair",
    "EvaluationResult",
    "answer_both",
    "compare_samples",
    "evaluate_pair",
    "model_context",
    "pair_samples",
)
