"""`python -m personalize` is the `personalize` command."""

from .cli import main

main()
