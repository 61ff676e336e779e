"""Values for the official chart of the collector (opentelemetry-collector): the same files, pods and limits as ``kubernetes``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

_ROOT = Path(__file__).parent.parent.parent
_CONFIG = _ROOT / "collector-config"
_KUBERNETES = _ROOT / "deploy" / "kubernetes"
_HEADER = """\
# Rendered by `make docs` from collector-config/ and deploy/kubernetes/; change those instead.
#
#   helm install {release} open-telemetry/opentelemetry-collector --version 0.170.0 --namespace esper --values {file}
#
# A null takes out what the chart brings along by default.
"""
# What the chart's own configuration has and ours has not.
_UNWANTED: dict[str, Any] = {
    "receivers": dict.fromkeys(("jaeger", "zipkin", "prometheus")),
    "processors": {"batch": None},
    "exporters": {"debug": None},
    "service": {"pipelines": dict.fromkeys(("logs", "metrics", "traces"))},
}
_KEEP = ("ESPER_", "POD_IP")


def values() -> dict[str, str]:
    """The files by name."""
    agent = _merged(
        _yaml(_CONFIG / "agent.yaml"), _yaml(_CONFIG / "to-gateway.yaml"), _yaml(_KUBERNETES / "agent-tokens.yaml")
    )
    tier = _yaml(_CONFIG / "gateway.yaml")
    on_nodes = _values("daemonset", agent, _KUBERNETES / "agent.yaml", has_host_ports=True)
    in_between = _values("statefulset", tier, _KUBERNETES / "tier.yaml", has_host_ports=False)
    return {
        "agent.yaml": _rendered("esper-otelcol-agent", "agent.yaml", on_nodes),
        "tier.yaml": _rendered("esper-otelcol", "tier.yaml", in_between),
    }


def _values(mode: str, config: dict[str, Any], manifest: Path, *, has_host_ports: bool) -> dict[str, Any]:
    objects = {each["kind"]: each for each in yaml.safe_load_all(manifest.read_text(encoding="utf-8"))}
    workload = objects["DaemonSet" if mode == "daemonset" else "StatefulSet"]
    pod = workload["spec"]["template"]["spec"]
    [container] = pod["containers"]
    image, _, tag = container["image"].rpartition(":")
    ours = {port["name"]: port["containerPort"] for port in container["ports"]}
    ports: dict[str, Any] = {
        name: {"enabled": False} for name in ("jaeger-compact", "jaeger-thrift", "jaeger-grpc", "zipkin")
    }
    for name, of_pod in (("otlp", "otlp-grpc"), ("otlp-http", "otlp-http"), ("metrics", "metrics")):
        number = ours[of_pod]
        ports[name] = {"enabled": True, "containerPort": number, "servicePort": number, "protocol": "TCP"}
        if has_host_ports and name != "metrics":
            ports[name]["hostPort"] = number
    own = {"config"}  # the chart mounts the configuration itself
    policy = objects["NetworkPolicy"]["spec"]
    found: dict[str, Any] = {
        "mode": mode,
        "fullnameOverride": workload["metadata"]["name"],
        "image": {"repository": image, "tag": tag},
        "command": {"name": "otelcol-contrib"},
        "config": _merged(_UNWANTED, config),
        "serviceAccount": {"create": True, "automountServiceAccountToken": False},
        "podSecurityContext": pod["securityContext"],
        "securityContext": container["securityContext"],
        "resources": container["resources"],
        "useGOMEMLIMIT": True,
        "extraEnvs": [each for each in container["env"] if each["name"].startswith(_KEEP)],
        "ports": ports,
        "extraVolumes": [each for each in pod["volumes"] if each["name"] not in own],
        "extraVolumeMounts": [each for each in container["volumeMounts"] if each["name"] not in own],
        "networkPolicy": {
            "enabled": True,
            "allowIngressFrom": [peer for rule in policy["ingress"] for peer in rule["from"]],
        },
    }
    if mode == "statefulset":
        found["replicaCount"] = workload["spec"]["replicas"]
        found["statefulset"] = {
            "podManagementPolicy": workload["spec"]["podManagementPolicy"],
            "volumeClaimTemplates": workload["spec"]["volumeClaimTemplates"],
        }
        found["podDisruptionBudget"] = {"enabled": True, **_budget(objects["PodDisruptionBudget"])}
        found["topologySpreadConstraints"] = pod["topologySpreadConstraints"]
    return found


def _budget(budget: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in budget["spec"].items() if name != "selector"}


def _merged(*parts: dict[str, Any]) -> dict[str, Any]:
    """Later ones change earlier ones, as the collector merges its files: maps together, lists as a whole."""
    found: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            both = isinstance(value, dict) and isinstance(found.get(key), dict)
            found[key] = _merged(found[key], value) if both else value
    return found


def _yaml(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content


def _rendered(release: str, file: str, content: dict[str, Any]) -> str:
    text = yaml.dump(content, Dumper=_Plain, sort_keys=False, allow_unicode=True, width=10_000)
    return _HEADER.format(release=release, file=f"deploy/helm/{file}") + text


class _Plain(yaml.SafeDumper):
    """Without anchors and aliases: Helm's users read these files."""

    def ignore_aliases(self, _data: Any) -> bool:
        """See PyYAML."""
        return True
