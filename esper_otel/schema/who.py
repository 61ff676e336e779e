"""Says in words on which device a process trains, and where it runs, from the attributes that describe both."""

from __future__ import annotations

from collections.abc import Mapping

_PARALLEL = "esper.parallel."


def device_in_words(attributes: Mapping[str, object]) -> str:
    """Returns model, PyTorch's name, UUID and PCI address of a device; empty if none of them is known."""
    model, name, uuid, bus_id = _texts(attributes, "hw.model", "esper.device.id", "hw.id", "esper.device.pci_bus_id")
    return _joined(model, name, uuid, bus_id and f"PCI {bus_id}")


def location_in_words(attributes: Mapping[str, object]) -> str:
    """Returns job, pod, node, local rank and place in parallel dimensions; empty if none of them is known."""
    job, pod, namespace, node, other_node, local_rank = _texts(
        attributes,
        *("slurm.job.id", "k8s.pod.name", "k8s.namespace.name"),
        *("slurm.node.name", "k8s.node.name", "esper.local_rank"),
    )
    parallel = [
        f"{name.removeprefix(_PARALLEL)} {attributes[name]}"
        for name in sorted(attributes)
        if name.startswith(_PARALLEL)
    ]
    return _joined(
        job and f"Slurm job {job}",
        pod and f"pod {namespace}/{pod}" if namespace else pod and f"pod {pod}",
        (node or other_node) and f"node {node or other_node}",
        local_rank and f"local rank {local_rank}",
        *parallel,
    )


def _texts(attributes: Mapping[str, object], *names: str) -> list[str]:
    return ["" if attributes.get(name) is None else str(attributes[name]) for name in names]


def _joined(*texts: str) -> str:
    return ", ".join(filter(None, texts))
