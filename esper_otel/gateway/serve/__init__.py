"""Serve: the two ports, who may come through them, and what they answer."""
