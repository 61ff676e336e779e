"""Gateway: OTLP in, Leyline packets out."""
