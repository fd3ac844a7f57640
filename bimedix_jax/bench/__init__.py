"""Timings against peers and physical limits, each a ratio within one run."""
