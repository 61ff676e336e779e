"""What a session knows of its device, as points that are sent in addition to steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from esper_otel.export.device_points import DevicePoint
from esper_otel.probes.description import DeviceDescription
from esper_otel.probes.sampler import Sampler
from esper_otel.schema import DEVICE_INFO, TWINS

# What the conventions want on the metrics of a GPU.
_OF_TWINS = ("hw.id", "hw.type", "hw.model", "hw.vendor", "hw.parent")


class DeviceReport:
    """Describes the training device on a thread of its own, so that a driver that hangs holds up nothing.

    Args:
        device: returns the training device's name, or None while it is unknown.
        where: attributes of the Resource that are repeated in the description, for joins with one hop.
        probed: returns the fresh readings of the probes; None if the GPU's metrics are not wanted under the
            conventions' names.
        period_s: time between two looks whether the device has changed.
    """

    def __init__(
        self,
        device: Callable[[], str | None],
        where: Mapping[str, str | int],
        probed: Callable[[], Mapping[str, float]] | None,
        period_s: float,
    ) -> None:
        self._description = DeviceDescription(device)
        self._sampler = Sampler([self._description], period_s=period_s)
        self._where = where
        self._probed = probed

    def start(self) -> None:
        """Starts the thread."""
        self._sampler.start()

    def stop(self, timeout_s: float) -> None:
        """Stops the thread; waits for an answer of the driver at most so long."""
        self._sampler.stop(timeout_s)

    def points(self) -> Sequence[DevicePoint]:
        """Returns what is known now; nothing before the device is known. Threads: any."""
        attributes = self._description.attributes
        if not attributes:
            return ()
        points = [DevicePoint(DEVICE_INFO, 1.0, {**attributes, **self._where})]
        if self._probed is None or "hw.id" not in attributes:
            return points
        readings = self._probed()
        known = {name: attributes[name] for name in _OF_TWINS if name in attributes}
        points += [
            DevicePoint(twin.metric, readings[twin.of] * twin.factor, known) for twin in TWINS if twin.of in readings
        ]
        return points
