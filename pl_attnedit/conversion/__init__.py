"""A whole conversion: its recipe, what is checked first, its run folder, the run itself, and studies of several."""

from pl_attnedit.moved import names_of

__getattr__ = names_of(
    "pl_attnedit.conversion.pipeline", "Conversion", "build_trainer", "check_machine", "convert", "save_student"
)
