"""Delivers later, from this or another machine, what sessions have left in files."""
