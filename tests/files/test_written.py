"""``esper-otel files``: what it writes, what it leaves alone, and thresholds of one's own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from programs import ROOT

from esper_otel.cli import main


def alerts(path: Path) -> dict[str, str]:
    groups = yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
    return {rule["alert"]: rule["expr"] for group in groups for rule in group["rules"] if "alert" in rule}


def test_it_writes_what_is_in_the_tree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["files", str(tmp_path / "new" / "monitoring")]) == 0
    folder = tmp_path / "new" / "monitoring"
    assert "files of esper_otel" in capsys.readouterr().out
    for name, source in (("collector-config", "collector-config"), ("prometheus", "deploy/prometheus")):
        for path in (ROOT / source).rglob("*.y*ml"):
            assert (folder / name / path.relative_to(ROOT / source)).read_bytes() == path.read_bytes(), path
    assert (folder / "grafana/dashboards/run.json").is_file()


def test_thresholds_of_ones_own(tmp_path: Path) -> None:
    """They replace what is usual for a run; inf leaves the alert out."""
    own = ("--threshold", "step_latency_high=900", "--threshold", "hook_budget=inf")
    assert main(["files", str(tmp_path), *own]) == 0
    for path in ("prometheus/rules/esper.yml", "prometheus/stock/rules/esper.yml"):
        found, usual = alerts(tmp_path / path), alerts(ROOT / "deploy" / path)
        assert usual.keys() - found.keys() == {"EsperHookBudget"}
        assert "> 900" in found["EsperStepLatencyHigh"]
        assert "quantile" not in found["EsperStepLatencyHigh"]
        assert found["EsperLossSpike"] == usual["EsperLossSpike"]


def test_changed_files_are_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second call replaces what nobody has touched; what somebody has changed, or put there, only by --force."""
    rules, agent = tmp_path / "prometheus/rules/esper.yml", tmp_path / "collector-config/agent.yaml"
    agent.parent.mkdir()
    agent.write_text("mine\n", encoding="utf-8")
    precious = tmp_path / "precious"
    precious.write_text("precious\n", encoding="utf-8")
    (tmp_path / "collector-config/gateway.yaml").symlink_to(precious)
    assert main(["files", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "is not from this command: collector-config/agent.yaml" in out
    assert "is not from this command: collector-config/gateway.yaml" in out
    assert agent.read_text(encoding="utf-8") == precious.read_text(encoding="utf-8").replace("precious", "mine")
    assert main(["files", str(tmp_path), "--threshold", "hook_budget=80"]) == 1  # its own file follows
    assert main(["files", str(tmp_path)]) == 1  # the thresholds stay
    assert "> 80" in alerts(rules)["EsperHookBudget"]
    assert "thresholds in the rules: hook_budget = 80" in capsys.readouterr().out
    rules.write_text("changed\n", encoding="utf-8")
    assert main(["files", str(tmp_path)]) == 1
    assert rules.read_text(encoding="utf-8") == "changed\n"
    assert main(["files", str(tmp_path), "--force"]) == 0
    assert "EsperHookBudget" in alerts(rules)


def test_nothing_is_written_where_a_link_leads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not even with --force: neither behind a folder that is a link, nor in the place of the record."""
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    for each in (folder, elsewhere):
        each.mkdir()
    (folder / "grafana").symlink_to(elsewhere)
    os.mkfifo(folder / "collector-config")
    assert main(["files", str(folder)]) == 2
    (folder / "collector-config").unlink()
    assert main(["files", str(folder), "--force"]) == 1
    assert "because a folder on its way is a link: grafana/" in capsys.readouterr().out
    assert not [*elsewhere.iterdir()]
    record = folder / ".esper-otel-files"
    record.unlink()
    record.symlink_to(elsewhere / "new")
    assert main(["files", str(folder), "--force"]) == 2
    assert "is a link" in capsys.readouterr().err
    assert not [*elsewhere.iterdir()]
    (tmp_path / "link").symlink_to(elsewhere)  # the folder itself is the user's choice
    assert main(["files", str(tmp_path / "link")]) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--threshold", "hook_budgt=80"], "unknown signal 'hook_budgt': did you mean 'hook_budget'?"),
        (["--threshold", "hook_budget"], "give SIGNAL=VALUE"),
        (["--threshold", "hook_budget=nan"], "the threshold of 'hook_budget' is not a number"),
    ],
)
def test_mistakes_are_named(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["files", str(tmp_path / "new"), *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert main(["files", str(tmp_path / "file")]) == 2
    (tmp_path / ".esper-otel-files").write_text("[]", encoding="utf-8")
    assert main(["files", str(tmp_path)]) == 2
    assert ".esper-otel-files is damaged" in capsys.readouterr().err
