"""The `personalize` command.

app.py        the group, exit codes and error lines     messages.py     one-line errors and warnings, answers in JSON
train.py      train, batch, finish, tell, report        generate.py     generate
adapters.py   convert, resize, diff, doctor, show       checkpoints.py  extract, bake, interpolate
merge.py      merge, and how it is repeated             dataset.py      the check of a dataset before training
presets.py    the presets, explained                    view.py         what a long command shows while it works
progress.py   one run seen from a terminal              batch.py        many runs seen from a terminal
live.py       reports while runs go on                  values.py       what people type, as values
jobs.py       the queue of a workspace               queueing.py     train and batch, where a server does them
work.py       commands as kinds of jobs               lane.py         the process of a lane's worker
listening.py  what long commands tell to such a job   group.py        what every command has: --json, -h
imports.py    what train and generate import of diffusers and transformers

Only click is imported with these; torch, pydantic and rich come with the command that needs them, so that help is instant.
"""

from .app import cli, main, run

__all__ = ["cli", "main", "run"]
