"""Sends steps over OTLP and registers the catalogue's instruments with a MeterProvider."""
