"""What happens in a run, as events: read from its frames, or noted where it happens."""
