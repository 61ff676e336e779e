"""Receive: bytes of a request become columns of points, each point judged once."""
