"""`make figures`: writes what `made` makes."""

from pl_attnedit.files import write_atomically
from results.figures import made

for path, text in made().items():
    write_atomically(path, text)
