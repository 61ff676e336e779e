"""Loops that are not ours: plain scripts, Lightning, Hugging Face. Each foreign framework has a module of its own."""
