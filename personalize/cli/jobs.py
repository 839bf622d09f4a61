"""`personalize jobs`: the queue of a workspace."""

from __future__ import annotations

from pathlib import Path

import click

from .values import PATH


@click.command(hidden=True)
@click.argument("workspace", type=PATH)
@click.argument("lane")
@click.argument("name")
def work(workspace: Path, lane: str, name: str) -> int:
    """Run the jobs of a lane: what the engine starts, and nobody else."""
    from ..jobs.worker import work as run_jobs

    return run_jobs(workspace, lane, name)
