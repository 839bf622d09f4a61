"""Fixtures of the service's tests: servers live as long as the session."""

from servers import busy, idle

__all__ = ["busy", "idle"]
