"""`python -m benchmarks.gpu`: build for the GPU of this machine, test, sanitize and measure, in a few minutes."""
