"""Bytes from servers: when to try again, what an interrupted run left, many files at once, reading without keeping."""
