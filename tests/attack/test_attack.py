"""The short form of ``make attack``: of each kind what is cheap and decisive, one after another at one gateway."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from attack.__main__ import ATTACKS, run
from attack.target import Attack, Target

pytestmark = pytest.mark.lengthy

# Those that look at answers come first: behind the others an answer takes longer than one attack has time here.
_QUICK = (
    *("broken-tokens", "forged-cursors", "smuggling", "fuzz", "slow-posts", "long-polls", "http2-floods"),
    *("far-ends", "empty-messages", "json-of-nothing", "seeds-at-own-times"),
)
_EACH_S = 0.3


def test_honest_peers_go_on_and_the_gateway_starts_again(tmp_path: Path) -> None:
    known = {attack.name: attack for attack in ATTACKS}
    quick = [known[name] for name in _QUICK]

    def one_after_another(target: Target) -> None:
        for attack in quick:
            attack.run(Target(target.gateway, time.monotonic() + _EACH_S, target.faults))

    row = run(Attack("all", "the quick ones", one_after_another), 2 * _EACH_S * len(quick), tmp_path)
    assert row.faults == ()


def test_every_attack_has_a_name_of_its_own() -> None:
    names = [attack.name for attack in ATTACKS]
    assert len(set(names)) == len(names)
