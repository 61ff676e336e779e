"""The short form of ``make attack``: what is cheap and decisive."""

from __future__ import annotations

from pathlib import Path

import pytest

from attack.__main__ import ATTACKS, run

QUICK = ("forged-cursors", "fuzz")


@pytest.mark.parametrize("name", QUICK)
def test_honest_peers_go_on_and_the_gateway_starts_again(name: str, tmp_path: Path) -> None:
    [attack] = [each for each in ATTACKS if each.name == name]
    row = run(attack, 1.0, tmp_path)
    assert row.faults == ()


def test_every_attack_has_a_name_of_its_own() -> None:
    names = [attack.name for attack in ATTACKS]
    assert len(set(names)) == len(names)
