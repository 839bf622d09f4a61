"""What every command has: --json, and its own -h."""

from __future__ import annotations

import click

HELP = ("-h", "--help")

json_option = click.option("--json", is_flag=True, expose_value=False, help="one line of JSON for programs; see docs/json.md")


class Commands(click.Group):
    """Commands that each have --json, and their own -h: click adds its automatic one only in the first context that asks."""

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        super().add_command(click.help_option(*HELP)(json_option(cmd)), name)
