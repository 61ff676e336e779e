"""What the live page shows, prepared from the store while somebody looks at it, and dropped afterwards."""
