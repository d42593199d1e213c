"""Benchmarks: run each as a module from the root of a checkout, such as `python -m benchmarks.speed.cpu --help`."""
