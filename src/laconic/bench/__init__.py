"""Benchmarks of artifacts and of weight shapes: time, bytes and energy."""
