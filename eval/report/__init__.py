"""Reports: the page, its tables and charts, Markdown, JSON, the comparison of conversions, the model card."""
