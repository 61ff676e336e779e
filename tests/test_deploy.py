"""What is shipped for deployment: well-formed, in step with each other, and as safe as it says."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from certificates import Authority
from gateways import RunningGateway

from esper_otel.cli import build_parser

pytestmark = pytest.mark.lengthy

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
COMPOSE = [DEPLOY / "compose" / "compose.yaml", DEPLOY / "lgtm" / "compose.yaml"]


def documents(path: Path) -> list[Any]:
    return [each for each in yaml.safe_load_all(path.read_text(encoding="utf-8")) if each]


def pods() -> Iterator[tuple[str, Any]]:
    """Each pod that a manifest makes."""

    def found(value: Any) -> Iterator[Any]:
        if isinstance(value, dict):
            if "containers" in value:
                yield value
            for each in value.values():
                yield from found(each)
        elif isinstance(value, list):
            for each in value:
                yield from found(each)

    for path in MANIFESTS:
        for document in documents(path):
            for pod in found(document):
                yield f"{path.name}: {document['kind']}", pod


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_fit_their_schemas(path: Path) -> None:
    """Strictly: a word that Kubernetes does not know is an error."""
    import kubernetes_validate

    for document in documents(path):
        if document.get("kind") in {None, "PyTorchJob"}:
            continue  # a collector's configuration; an operator's resource, whose schema is not at hand
        kubernetes_validate.validate(document, "1.31", strict=True)


def test_brokers_for_an_operator_are_what_the_scripts_make() -> None:
    """Its schemas are not at hand: the topics and the rules are compared with those that tests use."""
    sys.path.insert(0, str(DEPLOY / "kafka"))
    acls, topics = importlib.import_module("acls"), importlib.import_module("topics")
    made = documents(DEPLOY / "kafka" / "strimzi.yaml")
    options = argparse.Namespace(topics="esper", partitions=64, replication=3, keep_hours=24, keep_request_hours=24)
    of_scripts = {each.topic: (each.num_partitions, each.config) for each in topics.topics(options)}
    for topic in (each for each in made if each["kind"] == "KafkaTopic"):
        partitions, config = of_scripts.pop(topic["metadata"]["name"])
        assert topic["spec"]["partitions"] == partitions
        assert {name: str(value) for name, value in topic["spec"]["config"].items()} == config
    assert not of_scripts
    rules = {
        (rule.principal, rule.name, rule.operation.name.replace("_", ""))
        for rule in acls.rules("esper", "collector", "member", "server")
    }
    assert rules == {
        (f"User:{user['metadata']['name']}", acl["resource"]["name"], operation.upper())
        for user in made
        if user["kind"] == "KafkaUser"
        for acl in user["spec"]["authorization"]["acls"]
        for operation in acl["operations"]
    }


def test_pods_are_hardened() -> None:
    checked = 0
    for where, pod in pods():
        context = pod["securityContext"]
        assert context["runAsNonRoot"], where
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, where
        assert pod["automountServiceAccountToken"] is False, where
        assert pod["terminationGracePeriodSeconds"] >= 30, where
        for container in pod["containers"]:
            own = container["securityContext"]
            assert own["allowPrivilegeEscalation"] is False, where
            assert own["readOnlyRootFilesystem"], where
            assert own["capabilities"] == {"drop": ["ALL"]}, where
            assert "memory" in container["resources"]["limits"], where
            assert re.search(r":\d+\.\d+", container["image"]), where
            for variable in container["env"]:
                assert "0.0.0.0" not in str(variable.get("value")), where
        checked += 1
    assert checked == 8


def test_every_volume_that_a_pod_mounts_is_there_and_every_secret_is_documented() -> None:
    readme = (DEPLOY / "README.md").read_text(encoding="utf-8")
    claims = {
        claim["metadata"]["name"]
        for path in MANIFESTS
        for document in documents(path)
        if document.get("kind") == "StatefulSet"
        for claim in document["spec"].get("volumeClaimTemplates", ())
    }
    for where, pod in pods():
        names = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= names | claims, where
        for volume in pod["volumes"]:
            name = volume.get("secret", {}).get("secretName") or volume.get("configMap", {}).get("name")
            assert name is None or f"{name}" in readme, where


def test_variables_of_pods_and_services_are_those_that_the_collector_reads() -> None:
    """A name that is misspelt would leave the default in force."""
    configurations = [*(ROOT / "collector-config").glob("*.yaml"), DEPLOY / "kubernetes" / "agent-tokens.yaml"]
    known = set(re.findall(r"\$\{env:(\w+)", "".join(path.read_text(encoding="utf-8") for path in configurations)))
    given = {
        variable["name"]
        for _, pod in pods()
        for container in pod["containers"]
        for variable in container["env"]
        if variable["name"].startswith("ESPER_") and "otelcol" in container["image"] + container["name"]
    }
    [services] = [documents(path)[0]["services"] for path in COMPOSE[:1]]
    given |= {name for name in services["collector"]["environment"] if name.startswith("ESPER_")}
    unit = (DEPLOY / "systemd" / "esper-otelcol.service").read_text(encoding="utf-8")
    given |= set(re.findall(r"Environment=(ESPER_\w+)", unit))
    assert given <= known


@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.parent.name)
def test_compose_files_publish_to_this_machine_only_and_mount_what_is_there(path: Path) -> None:
    [file] = documents(path)
    for name, service in file["services"].items():
        for port in service["ports"]:
            assert port.startswith("127.0.0.1:"), name
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (path.parent / source).exists(), volume
            else:
                assert source in file["volumes"], volume
        assert "build" in service or re.search(r":v?\d+\.\d+\.\d+$", service["image"]), name
        if "build" in service:
            assert (path.parent / service["build"]["context"] / service["build"]["dockerfile"]).is_file()


def test_the_compose_file_of_a_tier_goes_with_the_others() -> None:
    """The broker is that of server.properties, and what it names is there."""
    [file] = documents(DEPLOY / "compose" / "kafka.yaml")
    services = file["services"]
    lines = (DEPLOY / "kafka" / "server.properties").read_text(encoding="utf-8").splitlines()
    ours = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    given = {
        name.removeprefix("KAFKA_").lower().replace("_", "."): value
        for name, value in services["kafka"]["environment"].items()
    }
    assert given.pop("heap.opts")
    own = {"listeners", "advertised.listeners", "log.dirs"}
    assert given.pop("controller.quorum.voters").startswith(f"{ours['node.id']}@")
    assert {name: ours.pop(name) for name in given if name not in own} == {
        name: value for name, value in given.items() if name not in own
    }
    assert ours.keys() - own == {"controller.quorum.bootstrap.servers"}
    [targets] = yaml.safe_load((DEPLOY / "compose" / "members.yml").read_text(encoding="utf-8"))
    members = [name for name in services if name.startswith("member")]
    assert targets["targets"] == [f"{name}:4328" for name in members]
    for name in ("gateway", *members):
        program = services[name].get("entrypoint", ["esper-otel", "gateway"])[1]
        arguments = [program, *services[name]["command"]]
        assert build_parser(arguments).parse_args(arguments).kafka == "kafka:9092"
    for name in ("kafka", "topics", *members):
        assert services[name]["cap_drop"] == ["ALL"], name
        assert services[name]["security_opt"] == ["no-new-privileges:true"], name
        assert "ports" not in services[name], name
    configs = [each.rpartition("/")[2] for each in services["collector"]["command"]]
    assert all((ROOT / "collector-config" / each).is_file() for each in configs)


def test_prometheus_is_configured_the_same_everywhere() -> None:
    """But for addresses."""
    ours = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text(encoding="utf-8"))
    composed = yaml.safe_load((DEPLOY / "compose" / "prometheus.yml").read_text(encoding="utf-8"))
    assert composed["scrape_configs"][1].pop("file_sd_configs")  # members, with kafka.yaml
    text = (
        yaml.safe_dump(composed).replace("collector:8888", "127.0.0.1:8888").replace("gateway:4328", "127.0.0.1:4328")
    )
    assert yaml.safe_load(text) == ours


def test_grafana_finds_its_data_source_and_dashboards() -> None:
    [provider] = documents(DEPLOY / "grafana" / "provisioning" / "dashboards" / "esper.yaml")
    [file] = documents(COMPOSE[0])
    targets = [volume.split(":")[1] for volume in file["services"]["grafana"]["volumes"]]
    assert provider["providers"][0]["options"]["path"] in targets
    home = file["services"]["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (DEPLOY / "grafana" / "dashboards" / Path(home).name).is_file()
    [provider] = documents(DEPLOY / "lgtm" / "dashboards.yaml")
    [file] = documents(COMPOSE[1])
    targets = [volume.split(":")[1] for volume in file["services"]["lgtm"]["volumes"]]
    assert provider["providers"][0]["options"]["path"] in targets


@pytest.mark.parametrize("unit", sorted((DEPLOY / "systemd").glob("*.service")), ids=lambda path: path.name)
def test_units_are_understood_by_systemd(unit: Path, tmp_path: Path) -> None:
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("systemd is not installed")
    text = re.sub(r"ExecStart=\S+", "ExecStart=/bin/true", unit.read_text(encoding="utf-8"))
    copy = tmp_path / unit.name
    copy.write_text(text, encoding="utf-8")
    done = subprocess.run([tool, "verify", copy], capture_output=True, text=True, check=False)
    assert "Unknown" not in done.stderr, done.stderr


def test_the_image_installs_the_gateway_and_nothing_that_trains() -> None:
    text = (DEPLOY / "gateway" / "Dockerfile").read_text(encoding="utf-8")
    assert "[kafka]" in text  # with what a member needs; the gateway is part of it
    assert "torch" not in text.replace("without torch", "")
    assert "USER 10001" in text
    for line in text.splitlines():
        if line.startswith("COPY") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), source


def health() -> Any:
    """The health check of the image, as a module."""
    path = DEPLOY / "gateway" / "health.py"
    found = importlib.util.spec_from_file_location("health", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["plain", "everywhere", "tls", "client-ca", "grpc alone"])
def test_the_health_check_asks_the_gateway_by_its_own_command_line(kind: str, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.pair("gateway")
    tls = ["--tls-cert", str(pair.certificate), f"--tls-key={pair.key}"]
    options = {
        "plain": [],
        "everywhere": ["--insecure"],
        "tls": tls,
        "client-ca": [*tls, "--client-ca", str(authority.certificate)],
        "grpc alone": ["--http", "none"],
    }[kind]
    with RunningGateway(*options) as gateway:
        http = gateway.http or "none"
        if kind == "everywhere":
            http = f"0.0.0.0:{gateway.http.rpartition(':')[2]}"
        options = [each for each in options if each not in ("--http", "none")]
        command = ["python", "esper-otel", "gateway", *options, "--http", http, f"--grpc={gateway.grpc}"]
        assert health().is_ready(command)
    assert not health().is_ready(command)


def test_the_image_asks_by_that_check_and_names_an_exact_python() -> None:
    text = (DEPLOY / "gateway" / "Dockerfile").read_text(encoding="utf-8")
    assert "/opt/esper/health.py" in text.partition("HEALTHCHECK")[2]
    assert set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) == {"python:3.11.14-slim-bookworm"}


@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.parent.name)
def test_compose_files_have_no_default_password_and_drop_what_they_do_not_need(path: Path) -> None:
    [file] = documents(path)
    for name, service in file["services"].items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
    [grafana] = [each for name, each in file["services"].items() if name in {"grafana", "lgtm"}]
    assert grafana["environment"]["GF_SECURITY_ADMIN_PASSWORD"].startswith("${ESPER_GRAFANA_PASSWORD:?")


def test_the_gateway_has_one_memory_limit_everywhere() -> None:
    """1 GiB to which it is held, and half of it for the pages of its files."""
    [file] = documents(COMPOSE[0])
    assert file["services"]["gateway"]["deploy"]["resources"]["limits"]["memory"] == "1536M"
    [container] = next(pod for where, pod in pods() if where.startswith("esper-gateway"))["containers"]
    assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"] == "1536Mi"
    assert "MemoryMax=1536M\n" in (DEPLOY / "systemd" / "esper-gateway.service").read_text(encoding="utf-8")


def test_images_are_pinned_by_what_docker_says(tmp_path: Path) -> None:
    """On a copy, with a docker that knows one digest; a second run changes nothing more."""
    copy = tmp_path / "deploy"
    shutil.copytree(DEPLOY, copy)
    tool = tmp_path / "docker"
    digest = "sha256:" + "0123456789abcdef" * 4
    tool.write_text(f"#!/bin/sh\necho {digest}\n", encoding="utf-8")
    tool.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for _ in range(2):
        subprocess.run([ROOT / "tools" / "pin-images", copy], env=environment, check=True, capture_output=True)
    [file] = documents(copy / "compose" / "compose.yaml")
    assert file["services"]["grafana"]["image"] == f"grafana/grafana:13.2.0@{digest}"
    text = (copy / "gateway" / "Dockerfile").read_text(encoding="utf-8")
    assert text.count(f"FROM python:3.11.14-slim-bookworm@{digest}") == 2
    assert f"@{digest} AS build\n" in text
    assert "@" not in re.findall(r"image: (\S+)", (copy / "kubernetes" / "esper-gateway.yaml").read_text("utf-8"))[0]
