"""Gateway: receives OTLP and serves Leyline packets."""
