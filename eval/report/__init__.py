"""Reports: the page, its tables and charts, Markdown, JSON, the comparison of conversions, the model card."""

from pl_attnedit.moved import names_of

__getattr__ = names_of("pl_attnedit.eval.report.page", "write_report")
