"""Measures a bundle: its engines, eager PyTorch and other rivals take turns, each in a process of its own."""
