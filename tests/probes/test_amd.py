"""AMD SMI against a stub of its documented Python interface; unproven on the real thing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from esper_otel.errors import ProbeUnavailable
from esper_otel.probes.amd import AmdGpu
from esper_otel.probes.probe import OtherHardware


class SmiError(Exception):
    pass


def smi(*places: str, busy: object = 37, celsius: object = 61) -> Any:
    calls: list[str] = []

    def activity(handle: str) -> dict[str, object]:
        if busy is SmiError:
            raise SmiError("busy")
        return {"gfx_activity": busy, "umc_activity": 1}

    return SimpleNamespace(
        calls=calls,
        AmdSmiException=SmiError,
        AmdSmiInitFlags=SimpleNamespace(INIT_AMD_GPUS=2),
        AmdSmiTemperatureType=SimpleNamespace(HOTSPOT=1),
        AmdSmiTemperatureMetric=SimpleNamespace(CURRENT=0),
        amdsmi_init=lambda flags: calls.append(f"init {flags}"),
        amdsmi_shut_down=lambda: calls.append("shut down"),
        amdsmi_get_processor_handles=lambda: list(places),
        amdsmi_get_gpu_device_bdf=lambda handle: handle,
        amdsmi_get_gpu_activity=activity,
        amdsmi_get_temp_metric=lambda handle, sensor, metric: celsius,
    )


def probe(module: Any, bus_id: str | None, *, is_amd: bool = True) -> AmdGpu:
    return AmdGpu(
        lambda: "cuda:0", index_of=lambda _: 0, identify=lambda _: (None, bus_id), is_amd=lambda: is_amd, smi=module
    )


def test_the_device_is_found_by_its_place_on_the_bus() -> None:
    module = smi("0000:03:00.0", "0000:41:00.0")
    read = probe(module, "00000000:41:00.0")
    assert read.sample() == {"gpu_util_percent": 37.0, "esper.device.temperature_celsius": 61.0}
    read.sample()
    read.close()
    assert module.calls == ["init 2", "shut down"]
    with pytest.raises(ProbeUnavailable, match="cannot tell which of 1 GPUs"):
        probe(smi("0000:03:00.0"), "00000000:41:00.0").sample()


def test_what_it_does_not_report_is_absent() -> None:
    with pytest.raises(ProbeUnavailable, match="does not report"):
        probe(smi("0000:03:00.0", busy="N/A"), None).sample()
    module = smi("0000:03:00.0", busy=SmiError)
    with pytest.raises(ProbeUnavailable, match="amdsmi failed: busy"):
        probe(module, None).sample()
    assert module.calls == ["init 2", "shut down"]  # the next sample starts afresh


def test_on_other_machines_another_probe_knows_better() -> None:
    with pytest.raises(OtherHardware):
        probe(smi(), None, is_amd=False).sample()
