"""Integrations with existing training loops: plain scripts, Lightning, Hugging Face. One module per framework."""
