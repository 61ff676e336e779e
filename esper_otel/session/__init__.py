"""Session: ``start()`` and what it wires together: identity, recording, deriving, exporting, and the end."""
