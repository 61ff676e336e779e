"""Store: released frames, in memory or in one SQLite file, bounded and shared out by tenant."""
