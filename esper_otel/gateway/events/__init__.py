"""The events of runs: numbered by their processes, stored once, and read through cursors."""
