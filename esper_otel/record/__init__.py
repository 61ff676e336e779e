"""Recording: the step scope, the seeds, the ring of frames."""
