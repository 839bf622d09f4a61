"""docs/kinds.md is what the hosts' rules say of files of each kind as they are now."""

from __future__ import annotations

import pytest
from slow import all_but

from personalize.adapters import hosts
from personalize.families.names import ROWS
from tools.architecture import ROOT
from tools.kinds import FAMILIES, HEAD, KINDS, cell, slots_of, table


@pytest.mark.parametrize("family", all_but({"pocket"}, FAMILIES))
def test_the_page_is_fresh_and_what_a_host_knows_it_finds(family: str) -> None:
    page = (ROOT / "docs" / "kinds.md").read_text(encoding="utf-8")
    assert page.startswith(HEAD) and table(family) in page, "run `make docs`"
    for kind in KINDS:
        for host in hosts.readers("kohya", ROWS[family], slots_of(family, kind)) if kind != "norms" else ():
            assert cell(family, kind, host).startswith("yes") == (
                {slot.name for slot in slots_of(family, kind).values()} <= {*host.kinds}
            )
