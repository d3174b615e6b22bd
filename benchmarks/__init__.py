"""Measurements of speed and memory: `python -m benchmarks.train_step recipe=NAME`."""
