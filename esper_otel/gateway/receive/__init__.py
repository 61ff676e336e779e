"""Receive: decodes the bytes of a request into columns of points and checks each point once."""
