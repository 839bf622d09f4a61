"""Fixtures of the plugins' tests: a real studio behind a host."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fronts import Front, fronting, settings_for
from servers import Service, busy, idle

__all__ = ["busy", "front", "idle"]


@pytest.fixture(scope="session")
def front(idle: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """A host in front of a studio whose jobs wait."""
    with fronting(settings_for(tmp_path_factory.mktemp("plugin"), idle.address)) as found:
        yield found
