"""The command ``compare``: a gate between two runs, for continuous integration."""
