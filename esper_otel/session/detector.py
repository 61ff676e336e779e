"""The resource detector ``esper_otel``, which gives the traces and logs of a process its run, Slurm job and GPU."""

from __future__ import annotations

import os
from collections.abc import Mapping

from opentelemetry.sdk.resources import Resource, ResourceDetector

from esper_otel.errors import EsperOtelError
from esper_otel.export.place import attributes_of
from esper_otel.probes.nvml import gpu_attributes
from esper_otel.schema.attribute_catalogue import SLURM
from esper_otel.session.identity import identify
from esper_otel.session.launcher import run_id_of_environment


class EsperResourceDetector(ResourceDetector):
    """Detects what the metrics of this process have too, so that traces and logs can be joined to them.

    Set ``OTEL_EXPERIMENTAL_RESOURCE_DETECTORS=otel,esper_otel``, or name it in a configuration file. The run id is left
    out if it is generated when the session starts: set ``ESPER_RUN_ID`` to have it everywhere.
    """

    def detect(self) -> Resource:
        """See ``ResourceDetector``."""
        return Resource({**_of_run(os.environ), **attributes_of(SLURM, os.environ), **gpu_attributes()})


def _of_run(environ: Mapping[str, str]) -> dict[str, str | int]:
    try:
        # An id of our own, so that none is generated, and nothing is agreed on with other ranks.
        run = identify(run_id="-", experiment=None, rank=None, world_size=None, environ=environ)
        run_id = run_id_of_environment(environ)
    except EsperOtelError:
        return {}
    found: dict[str, str | int] = {"esper.rank": run.rank, "esper.world_size": run.world_size}
    return found if run_id is None else {"esper.run.id": run_id, **found}
