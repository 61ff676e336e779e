"""Every attribute of the metrics, declared once: those of the Resource, of the device's description, and of points."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal, NamedTuple


class Carrier(StrEnum):
    """What has an attribute."""

    RESOURCE = "Resource"
    DEVICE = "`esper.device.info`"
    POINT = "points"
    SCOPE = "scopes"


class Attribute(NamedTuple):
    """A declared attribute.

    Attributes:
        name: its name; ``*`` at the end stands for several names.
        meaning: one line for users.
        source: where it is from, if it is not read from variables of the environment.
        variables: the variables that may have it; the first one that is set counts.
        type: the type of its value.
        places: what has it.
        example: a value, for texts.
    """

    name: str
    meaning: str
    source: str = ""
    variables: tuple[str, ...] = ()
    type: Literal["string", "int"] = "string"
    places: tuple[Carrier, ...] = (Carrier.RESOURCE,)
    example: str = ""

    @property
    def is_of_conventions(self) -> bool:
        """Whether the name is one of OpenTelemetry's semantic conventions."""
        return "." in self.name and not self.name.startswith(("esper.", "slurm."))


_DEVICE = (Carrier.DEVICE,)
_BOTH = (Carrier.RESOURCE, Carrier.DEVICE)
_POINT = (Carrier.POINT,)

RUN: tuple[Attribute, ...] = (
    Attribute("service.name", "The kind of program.", "`OTEL_SERVICE_NAME`, or `esper-tolaria`"),
    Attribute("service.instance.id", "Run and rank: `run/rank`.", "session"),
    Attribute("esper.run.id", "The run.", "`start()`, `ESPER_RUN_ID`, launcher", example="digits-7"),
    Attribute("esper.run.attempt", "Which start of the run.", "`ESPER_RUN_ATTEMPT`, launcher, clock", type="int"),
    Attribute("esper.rank", "The process among the ranks.", "`start()`, launcher", type="int"),
    Attribute("esper.world_size", "Number of ranks.", "`start()`, launcher", type="int"),
    Attribute("esper.experiment.name", "The experiment.", "`start()`", example="digits"),
    Attribute("esper.device.type", "`cuda`, `cpu` or another.", "`start()`, first step", example="cuda"),
    Attribute("esper.device.id", "PyTorch's name of it.", "`start()`, first step", places=_BOTH, example="cuda:0"),
    Attribute("esper.device.compute_capability", "CUDA's, as major * 10 + minor.", "PyTorch", type="int"),
    Attribute("esper.parallel.*", "Place in a parallel dimension.", "`start()`, `ESPER_PARALLEL`", type="int"),
    Attribute("esper.settings", "Settings that differ from the defaults; no paths.", "settings", example="ui = True"),
    Attribute("esper.alerts", "`off`: no alerts in Prometheus.", "`OTEL_RESOURCE_ATTRIBUTES`", example="off"),
)
PROCESS: tuple[Attribute, ...] = (
    Attribute("host.name", "The host.", "operating system"),
    Attribute("host.id", "The machine's id; absent in a container.", "`/etc/machine-id`", places=_BOTH),
    Attribute("host.arch", "Its architecture.", "operating system"),
    Attribute("container.id", "The container.", "control group or mounts"),
    Attribute("process.pid", "The process.", "operating system", type="int"),
    Attribute("process.runtime.name", "The kind of Python.", "Python"),
    Attribute("process.runtime.version", "Its version.", "Python"),
    Attribute("process.runtime.description", "Its version and build.", "Python"),
    Attribute("vcs.ref.head.revision", "The commit that is checked out.", "git"),
    Attribute("telemetry.sdk.*", "OpenTelemetry's SDK: language, name, version.", "SDK"),
)
SLURM: tuple[Attribute, ...] = (
    Attribute("slurm.cluster.name", "Slurm's cluster.", variables=("SLURM_CLUSTER_NAME",), example="leonardo"),
    Attribute("slurm.job.id", "The job.", variables=("SLURM_JOB_ID",), example="4711"),
    Attribute("slurm.job.name", "Its name.", variables=("SLURM_JOB_NAME",), example="digits"),
    Attribute("slurm.job.partition", "Its partition.", variables=("SLURM_JOB_PARTITION",), example="gpu"),
    Attribute("slurm.array.job.id", "Its array of jobs.", variables=("SLURM_ARRAY_JOB_ID",), example="4700"),
    Attribute("slurm.array.task.id", "Its number in the array.", variables=("SLURM_ARRAY_TASK_ID",), example="11"),
    Attribute("slurm.step.id", "The job step.", variables=("SLURM_STEP_ID",), example="0"),
    Attribute(
        "slurm.restart.count",
        "How often Slurm has started the job again.",
        variables=("SLURM_RESTART_COUNT",),
        example="1",
    ),
    Attribute("slurm.node.name", "The node.", variables=("SLURMD_NODENAME",), example="node-3"),
)
KUBERNETES: tuple[Attribute, ...] = (
    Attribute("k8s.pod.name", "The pod.", variables=("K8S_POD_NAME", "POD_NAME")),
    Attribute("k8s.pod.uid", "Its UID.", variables=("K8S_POD_UID", "POD_UID")),
    Attribute("k8s.namespace.name", "Its namespace.", variables=("K8S_NAMESPACE_NAME", "POD_NAMESPACE")),
    Attribute("k8s.node.name", "Its node.", variables=("K8S_NODE_NAME", "NODE_NAME")),
    Attribute("k8s.job.name", "The job that it belongs to.", variables=("K8S_JOB_NAME", "JOB_NAME")),
    Attribute("k8s.container.name", "The container.", variables=("K8S_CONTAINER_NAME", "CONTAINER_NAME")),
)
RANKS: tuple[Attribute, ...] = (
    Attribute(
        "esper.local_rank",
        "The rank's number on its node.",
        variables=("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"),
        type="int",
        places=_BOTH,
    ),
    Attribute(
        "esper.torchrun.restart.count",
        "How often torchrun has started the workers again.",
        variables=("TORCHELASTIC_RESTART_COUNT",),
        type="int",
    ),
)
DEVICE: tuple[Attribute, ...] = (
    Attribute("hw.type", "`gpu` or `cpu`.", "training device", places=_DEVICE),
    Attribute("hw.vendor", "Who has made the GPU.", "NVML or PyTorch", places=_DEVICE),
    Attribute("hw.model", "Name of the model.", "NVML or PyTorch; a CPU's, `/proc/cpuinfo`", places=_DEVICE),
    Attribute("hw.id", "UUID of the GPU or MIG instance, as in `nvidia-smi -L`.", "NVML or PyTorch", places=_DEVICE),
    Attribute("hw.parent", "UUID of the GPU that a MIG instance is part of.", "NVML", places=_DEVICE),
    Attribute("hw.driver_version", "Version of the GPU's driver.", "NVML", places=_DEVICE),
    Attribute(
        "esper.device.pci_bus_id",
        "PCI bus id of the GPU, as DCGM writes it.",
        "NVML or PyTorch",
        places=_DEVICE,
        example="00000000:65:00.0",
    ),
    Attribute("esper.device.index", "NVML's number of the GPU, DCGM's `gpu`.", "NVML", type="int", places=_DEVICE),
)
POINTS: tuple[Attribute, ...] = (
    Attribute("seed_id", "The seed.", "`now.seed()`", places=_POINT, example="seed-3"),
    Attribute("phase", "The phase.", "`telemetry.phase()`", places=_POINT, example="checkpoint"),
    Attribute("reason", "Why, for counts that are split by it.", "session", places=_POINT, example="buffer full"),
    Attribute("signal", "The risk signal.", "settings", places=_POINT, example="hook_budget"),
    Attribute("outcome", "How the run has ended.", "session", places=_POINT, example="completed"),
    Attribute("esper.schema.version", "Version of our names.", "package", places=(Carrier.SCOPE,), example="1"),
)

ATTRIBUTES: tuple[Attribute, ...] = (*RUN, *PROCESS, *SLURM, *KUBERNETES, *RANKS, *DEVICE, *POINTS)
