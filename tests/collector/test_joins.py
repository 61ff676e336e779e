"""Joins of ranks with their Resource and device, on the dashboards and on the page, by promtool's unit tests."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from programs import ROOT, built

pytestmark = pytest.mark.collector

RESOURCE = (
    'target_info{{job="e",instance="seen/{rank}",esper_run_id="seen",esper_rank="{rank}",'
    'esper_experiment_name="digits",host_name="h{rank}",process_pid="{pid}"}}'
)
DEVICE = (
    'esper_device_info{{job="e",instance="seen/0",run_id="seen",rank="0",esper_device_id="cuda:0",'
    'hw_model="NVIDIA H200",hw_id="GPU-{uuid}"}}'
)
OLD, NEW = "1x16 _x30", "_x20 1x20"  # the attempt that ends after 4 minutes, and the one that begins after 5
SERIES = {
    **{RESOURCE.format(rank=rank, pid=1): OLD for rank in (0, 1)},
    **{RESOURCE.format(rank=rank, pid=2): NEW for rank in (0, 1)},
    DEVICE.format(uuid="old"): OLD,
    DEVICE.format(uuid="new"): NEW,
    **{f'step_latency_ms{{job="e",instance="seen/{n}",run_id="seen",rank="{n}"}}': "7x40" for n in (0, 1)},
    'gpu_util_percent{job="e",instance="seen/0",run_id="seen",rank="0"}': "50x40",
    'DCGM_FI_DEV_POWER_USAGE{UUID="GPU-new",gpu="3"}': "500x40",
    'DCGM_FI_DEV_GPU_TEMP{UUID="GPU-new",gpu="3"}': "90x40",
}
RESUMED, LATE = "8m", "9m59s"  # when both attempts are within the look-back, and when only the second is


def judged(folder: Path, at: str, expected: dict[str, list[tuple[str, float]]]) -> None:
    """Has promtool compare what expressions return with labels and values."""
    tests = [
        {"expr": expr, "eval_time": at, "exp_samples": [{"labels": labels, "value": n} for labels, n in samples]}
        for expr, samples in expected.items()
    ]
    series = [{"series": name, "values": values} for name, values in SERIES.items()]
    content: dict[str, Any] = {
        "evaluation_interval": "15s",
        "tests": [{"interval": "15s", "input_series": series, "promql_expr_test": tests}],
    }
    file = folder / "test.yml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    tool = built("prometheus").with_name("promtool")
    done = subprocess.run([tool, "test", "rules", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_resumed_run_is_shown_once_with_its_newest_device(tmp_path: Path) -> None:
    """Its earlier attempt was on another GPU; a rank whose device is unknown is there, too."""
    board = json.loads((ROOT / "deploy/grafana/dashboards/run.json").read_text(encoding="utf-8"))
    [panel] = [panel for panel in board["panels"] if panel["title"] == "Who is it?"]
    expr = panel["targets"][0]["expr"]
    for name, value in {"run": "seen", "rank": ".*", "__range": "600s", "__interval": "5s"}.items():
        expr = expr.replace(f"${name}", value)
    of_rank = 'esper_experiment_name="digits",esper_run_id="seen"'
    device = 'esper_device_id="cuda:0",hw_model="NVIDIA H200",hw_id="GPU-new"'
    rows = [
        (f'{{{of_rank},esper_rank="0",host_name="h0",{device}}}', 480_000.0),
        (f'{{{of_rank},esper_rank="1",host_name="h1"}}', 480_000.0),
    ]
    judged(tmp_path, RESUMED, {expr: rows})


def test_the_joins_on_the_page_return_what_it_says(tmp_path: Path) -> None:
    page = (ROOT / "docs/reference/attributes.md").read_text(encoding="utf-8")
    plain, newest, dcgm = re.findall(r"```promql\n(.*?)```", page, re.DOTALL)
    [of_resource, of_device], [power, hot] = plain.strip().splitlines(), dcgm.strip().split("\n\n")
    rank = 'job="e",instance="seen/{0}",run_id="seen",rank="{0}"'
    joined = [("{" + f'{rank.format(n)},esper_experiment_name="digits",host_name="h{n}"' + "}", 7.0) for n in (0, 1)]
    used = "{" + f'{rank.format(0)},hw_model="NVIDIA H200",hw_id="GPU-new"' + "}"
    expected = {
        of_resource: joined,
        of_device: [(used, 50.0)],
        power: [('{UUID="GPU-new",run_id="seen",rank="0"}', 500.0)],
        hot: [("step_latency_ms{" + rank.format(0) + "}", 7.0)],
    }
    judged(tmp_path, LATE, expected)
    hosts = [("{" + f'{rank.format(n)},host_name="h{n}"' + "}", 7.0) for n in (0, 1)]
    judged(tmp_path, RESUMED, {newest.strip(): hosts})
