"""Derived metrics: pure folds over the steps."""
