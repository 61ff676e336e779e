"""A short run of the fuzzing of files; ``make fuzz`` takes minutes."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz_files import KINDS, fuzz

pytestmark = pytest.mark.lengthy


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_anybody_do_no_harm(kind: str, tmp_path: Path) -> None:
    assert fuzz(kind, seconds=0.3, seed=18, folder=tmp_path) > 0
