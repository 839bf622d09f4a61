"""Fixtures of the service's tests: servers, a client and a training, which live as long as the session."""

from servers import archive, busy, client, idle, trained

__all__ = ["archive", "busy", "client", "idle", "trained"]
