"""Attacks on a gateway of one's own: ``make attack``. Each runs next to an honest trainer and an honest puller."""
