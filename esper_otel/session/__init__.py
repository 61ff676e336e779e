"""Sessions: ``start()``, the identity of the process, the ``Telemetry`` object, and the end of the process."""
