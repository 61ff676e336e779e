"""Where the hours of a run went: sums over steps and phases, and the bar that adds up to its wall time."""
