"""Reports what happened in a run, from a black box or a gateway, as a page and as tables."""
