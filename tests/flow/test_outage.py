"""An outage of the endpoint in the middle of a run, in small; the whole is ``make soak``."""

from __future__ import annotations

from pathlib import Path

import pytest
from patience import patience
from programs import soak

pytestmark = pytest.mark.lengthy


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
@pytest.mark.parametrize("spool", [False, True], ids=["in memory", "spooled"])
def test_every_point_arrives_through_refused_and_hanging_and_sigterm(
    protocol: str, spool: bool, tmp_path: Path
) -> None:
    """Each (stream, time, value) that was recorded, and no other."""
    environment = {"ESPER_SPOOL_DIR": str(tmp_path / "spool")} if spool else {}
    report = soak("outage").run(2_000, 1_500.0, protocol, tmp_path, **environment)
    assert (report.missing, report.wrong) == (0, 0)
    assert report.steps == 2_000
    assert report.points == 2_000 * (21 + 8 * 9)
    assert report.flush_s < patience(5.5)
    assert report.status == -15
    assert "dropped 0" in report.said
    if spool:
        assert list((tmp_path / "spool").iterdir()) == []
