"""The same work done by other libraries, or without ours, in the same run. `python -m benchmarks.peers` runs all."""
