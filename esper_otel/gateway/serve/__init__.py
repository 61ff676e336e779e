"""Serves the gateway's two ports: access, limits, and answers."""
