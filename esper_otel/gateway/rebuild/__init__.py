"""Rebuild: points become frames again, in order, for each writer."""
