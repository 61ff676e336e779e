"""Rebuild: reassembles points into frames, in order, for each writer."""
