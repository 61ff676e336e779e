"""Where a process runs, as its Resource says it, at a real receiver."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import warm

from esper_otel.export.place import container_id, place
from esper_otel.schema.attribute_catalogue import ATTRIBUTES, Carrier
from esper_otel.testing import MemoryCollector

ID = "0123456789abcdef" * 4
SCRIPT = "import esper_otel\nwith esper_otel.start() as t:\n    t.record_step({'loss': 1.0}, epoch=0)"
LAUNCHED = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_PARTITION": "gpu",
    "SLURM_ARRAY_JOB_ID": "4700",
    "SLURM_ARRAY_TASK_ID": "11",
    "SLURMD_NODENAME": "node-3",
    "KUBERNETES_SERVICE_HOST": "10.0.0.1",
    "POD_NAME": "digits-7-abc",
    "POD_NAMESPACE": "training",
    "NODE_NAME": "k8s-node-1",
    "JOB_NAME": "digits-7",
    "LOCAL_RANK": "1",
    "ESPER_PARALLEL": "dp=3,tp=0",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "OTEL_RESOURCE_ATTRIBUTES": "k8s.node.name=named-by-hand",
}


def attributes_received(collector: MemoryCollector) -> dict[str, object]:
    resource = collector.requests[0].resource_metrics[0].resource
    kinds = {each.key: each.value for each in resource.attributes}
    return {name: getattr(value, str(value.WhichOneof("value"))) for name, value in kinds.items()}


def test_the_resource_says_where_the_process_runs() -> None:
    """What the launcher and the manifests set arrives; what the user names takes precedence."""
    with MemoryCollector() as collector:
        environ = {**os.environ, **LAUNCHED, "OTEL_EXPORTER_OTLP_ENDPOINT": collector.grpc_endpoint}
        assert warm.run("-c", SCRIPT, env=environ, imported=warm.PACKAGE).returncode == 0
        found = attributes_received(collector)
    expected = {
        "slurm.job.id": "4711",
        "slurm.job.partition": "gpu",
        "slurm.array.job.id": "4700",
        "slurm.array.task.id": "11",
        "slurm.node.name": "node-3",
        "k8s.pod.name": "digits-7-abc",
        "k8s.namespace.name": "training",
        "k8s.job.name": "digits-7",
        "k8s.node.name": "named-by-hand",
        "esper.local_rank": 1,
        "esper.parallel.dp": 3,
        "esper.parallel.tp": 0,
        "esper.torchrun.restart.count": 2,
    }
    assert {name: found.get(name) for name in expected} == expected
    assert {"host.name", "host.arch"} <= found.keys()
    types = {
        each.name: {"string": str, "int": int}[each.type] for each in ATTRIBUTES if Carrier.RESOURCE in each.places
    }
    several = [name.removesuffix("*") for name in types if name.endswith("*")]
    chosen = {name: next((f"{each}*" for each in several if name.startswith(each)), name) for name in found}
    assert {name: types.get(chosen[name]) for name in found} == {name: type(value) for name, value in found.items()}


@pytest.mark.parametrize(
    ("environ", "absent"),
    [
        ({"JOB_NAME": "build", "NODE_NAME": "ci"}, "k8s."),
        ({"LOCAL_RANK": "first"}, "esper."),
        ({"SLURM_JOB_ID": ""}, "slurm."),
    ],
)
def test_what_is_uncertain_is_absent(environ: Mapping[str, str], absent: str, tmp_path: Path) -> None:
    """Common names count in a pod only, and a number must be one."""
    assert not [name for name in place(environ, tmp_path) if name.startswith(absent)]


@pytest.mark.parametrize(
    ("file", "line", "expected"),
    [
        ("cgroup", f"12:memory:/docker/{ID}", ID),
        ("cgroup", f"0::/kubepods.slice/kubepods-pod1.slice/cri-containerd-{ID}.scope", ID),
        ("cgroup", "0::/user.slice/session-1.scope", ""),
        ("mountinfo", f"9 8 0:1 /var/lib/docker/containers/{ID}/hostname /etc/hostname rw - ext4 /dev/x rw", ID),
        ("mountinfo", f"9 8 0:1 /var/lib/docker/containers/{ID}/hostname /mnt/other rw - ext4 /dev/x rw", ""),
    ],
)
def test_the_containers_id_is_that_of_its_control_group_or_mounts(
    file: str, line: str, expected: str, tmp_path: Path
) -> None:
    folder = tmp_path / "proc/self"
    folder.mkdir(parents=True)
    (folder / file).write_text(f"{line}\n", encoding="utf-8")
    assert container_id(tmp_path) == expected


def test_the_machines_id_is_read_outside_of_containers_only(tmp_path: Path) -> None:
    """An image may have an id of its own, the same on every machine."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/machine-id").write_text("0123456789abcdef0123456789abcdef\n", encoding="utf-8")
    assert place({}, tmp_path)["host.id"] == "0123456789abcdef0123456789abcdef"
    assert "host.id" not in place({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, tmp_path)
    (tmp_path / ".dockerenv").touch()
    assert "host.id" not in place({}, tmp_path)
    (tmp_path / ".dockerenv").unlink()
    (tmp_path / "etc/machine-id").write_text("uninitialized\n", encoding="utf-8")
    assert "host.id" not in place({}, tmp_path)
