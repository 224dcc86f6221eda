"""A whole conversion: its recipe, what is checked first, its run folder, the run itself, and studies of several."""
