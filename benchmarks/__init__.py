"""Measurements. Each one checks its result before it prints a time, and can write JSON."""
