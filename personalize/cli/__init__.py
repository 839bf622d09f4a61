"""The `personalize` command.

app.py        the group, exit codes and error lines     messages.py  one-line errors and warnings
train.py      train, batch, report; flags from settings  generate.py  generate
adapters.py   convert, resize, extract, bake, ...        merge.py     merge, and how it is repeated
dataset.py    the check of a dataset before training     progress.py  runs seen from a terminal
values.py     what people type, as values                live.py      reports while runs go on

Only click is imported with these; torch, pydantic and rich come with the command that needs them, so that help is instant.
"""

from .app import cli, main, run

__all__ = ["cli", "main", "run"]
