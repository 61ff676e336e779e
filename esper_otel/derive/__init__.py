"""Derived metrics, computed step by step by processors without side effects."""
