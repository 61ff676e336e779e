"""Recording: the step scope, the seeds, and the publication of one frame per step."""
