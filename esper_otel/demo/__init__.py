"""The demo: a real morphogenetic training run on real data, small enough to watch."""
