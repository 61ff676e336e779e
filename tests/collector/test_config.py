"""The shipped configurations: valid, without deprecated names, and made of nothing that users do not have."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from certificates import Authority
from programs import CONFIG, ROOT, built

pytestmark = pytest.mark.collector

SHIPPED = [("agent.yaml",), ("agent.yaml", "to-gateway.yaml"), ("gateway.yaml",)]
SHIPPED += [("gateway.yaml", "to-kafka.yaml"), ("gateway.yaml", "to-kafka.yaml", "to-kafka-plain.yaml")]
# What a component is called in a configuration, by its module's name.
TYPES = {
    "otlpreceiver": "otlp",
    "memorylimiterprocessor": "memory_limiter",
    "transformprocessor": "transform",
    "otlpexporter": "otlp_grpc",
    "otlphttpexporter": "otlp_http",
    "kafkaexporter": "kafka",
    "loadbalancingexporter": "load_balancing",
    "prometheusexporter": "prometheus",
    "prometheusremotewriteexporter": "prometheus_remote_write",
    "bearertokenauthextension": "bearertokenauth",
    "healthcheckextension": "health_check",
    "filestorage": "file_storage",
}


def secrets(folder: Path) -> Mapping[str, str]:
    """The files that the configurations name, and the variables that say where they are."""
    authority = Authority(folder, "ca")
    pair = authority.pair("tls")
    pair.certificate.rename(folder / "tls.crt")
    authority.certificate.rename(folder / "ca.crt")
    (folder / "kafka-ca.crt").write_bytes((folder / "ca.crt").read_bytes())
    for name in ("agents.tokens", "esper-gateway.token", "prometheus.token", "token"):
        (folder / name).write_text("token\n", encoding="utf-8")
    return {
        "ESPER_OTELCOL_SECRETS": str(folder),
        "ESPER_TIER_TOKEN_FILE": str(folder / "token"),
        "ESPER_TIER_CA": str(folder / "ca.crt"),
        "ESPER_OTELCOL_QUEUE": str(folder / "queue"),
    }


def without_nulls(value: object) -> object:
    """As Helm takes out what a null stands for."""
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return value


@pytest.mark.parametrize("name", ["agent.yaml", "tier.yaml"])
def test_the_collector_accepts_what_helm_gives_it(name: str, tmp_path: Path) -> None:
    """The configuration within the values for the official chart."""
    values = yaml.safe_load((ROOT / "deploy" / "helm" / name).read_text(encoding="utf-8"))
    file = tmp_path / "relay.yaml"
    file.write_text(yaml.safe_dump(without_nulls(values["config"])), encoding="utf-8")
    done = subprocess.run(
        [built("collector"), "validate", f"--config={file}"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **secrets(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    mounted = {mount["name"] for mount in values["extraVolumeMounts"]}
    claims = {claim["metadata"]["name"] for claim in values.get("statefulset", {}).get("volumeClaimTemplates", ())}
    assert mounted == {volume["name"] for volume in values["extraVolumes"]} | claims


@pytest.mark.parametrize("files", SHIPPED, ids="+".join)
def test_the_collector_accepts_it_without_a_word(files: tuple[str, ...], tmp_path: Path) -> None:
    """A deprecated name is a line in its log."""
    options = [f"--config={CONFIG / file}" for file in files]
    done = subprocess.run(
        [built("collector"), "validate", *options],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **secrets(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stdout + done.stderr
    assert "alias" not in done.stdout + done.stderr


def test_the_collector_accepts_the_tenant_of_the_readme(tmp_path: Path) -> None:
    """With the tier's own file, as the text says."""
    text = (ROOT / "deploy" / "README.md").read_text(encoding="utf-8")
    tenant = text.partition("<!-- example: tenant -->\n```yaml\n")[2].partition("```")[0]
    (tmp_path / "red.yaml").write_text(tenant, encoding="utf-8")
    given = secrets(tmp_path)
    for name in ("red-agents.tokens", "red-gateway.token"):
        (tmp_path / name).write_text("token\n", encoding="utf-8")
    options = [f"--config={CONFIG / 'gateway.yaml'}", f"--config={tmp_path / 'red.yaml'}"]
    done = subprocess.run(
        [built("collector"), "validate", *options],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **given},
    )
    assert done.returncode == 0, done.stderr


def test_a_wrong_key_is_found(tmp_path: Path) -> None:
    """The test above can fail."""
    (tmp_path / "wrong.yaml").write_text("receivers: {otlp: {protocols: {grpc: {endpoynt: x}}}}", encoding="utf-8")
    options = [f"--config={CONFIG / 'agent.yaml'}", f"--config={tmp_path / 'wrong.yaml'}"]
    done = subprocess.run([built("collector"), "validate", *options], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "endpoynt" in done.stderr


def test_the_manifest_has_exactly_what_the_configurations_and_tests_use() -> None:
    manifest = yaml.safe_load((CONFIG / "builder.yaml").read_text(encoding="utf-8"))
    built_in = {
        kind: {TYPES[entry["gomod"].split()[0].rpartition("/")[2]] for entry in manifest[kind]}
        for kind in ("receivers", "processors", "exporters", "extensions")
    }
    used: dict[str, set[str]] = {kind: set() for kind in built_in}
    for file in {file for files in SHIPPED for file in files}:
        configuration = yaml.safe_load((CONFIG / file).read_text(encoding="utf-8"))
        for kind in used:
            used[kind] |= {name.partition("/")[0] for name in configuration.get(kind, ())}
    used["exporters"].add("prometheus_remote_write")  # of a test
    assert built_in == used
    versions = {entry["gomod"].split()[1] for kind in built_in for entry in manifest[kind]}
    assert versions == {f"v{manifest['dist']['version']}"}
    assert f"builder=v{manifest['dist']['version']}" in (ROOT / "tools" / "build").read_text(encoding="utf-8")


@pytest.mark.parametrize("file", sorted({file for files in SHIPPED for file in files}))
def test_every_variable_has_a_default_and_is_documented(file: str) -> None:
    text = (CONFIG / file).read_text(encoding="utf-8")
    readme = (CONFIG / "README.md").read_text(encoding="utf-8")
    for variable in re.findall(r"\$\{env:([^}]*)\}", text):
        name, has_default, default = variable.partition(":-")
        assert has_default, variable
        assert f"`{name}`" in readme
        assert f"`{default}`" in readme


def test_queues_keep_everything_and_in_order() -> None:
    """What the promise hangs on."""
    for file in ("agent.yaml", "to-gateway.yaml", "gateway.yaml"):
        configuration = yaml.safe_load((CONFIG / file).read_text(encoding="utf-8"))
        for name, exporter in configuration["exporters"].items():
            if name == "prometheus":
                continue
            assert exporter["retry_on_failure"]["max_elapsed_time"] == "0s", name
            assert exporter["sending_queue"]["storage"] == "file_storage/queue", name
            assert exporter["sending_queue"]["num_consumers"] == 1, name
        for name, pipeline in configuration["service"]["pipelines"].items():
            if file != "to-gateway.yaml":
                assert pipeline["processors"][0] == "memory_limiter", name
