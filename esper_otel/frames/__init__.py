"""Frames: one training step as data, the ring that keeps steps in memory, and their form on disk."""
