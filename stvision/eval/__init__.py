"""Metrics and benchmark formats: pure functions on arrays and records."""
