"""Report: what happened in a run, from a black box or from a gateway: one page, one table."""
