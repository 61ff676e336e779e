"""Stores released frames in memory or in one SQLite file, within limits that are shared between tenants."""
