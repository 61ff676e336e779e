"""Check: ``esper-otel check``: what is wrong between a trainer and the places where its telemetry should be."""
