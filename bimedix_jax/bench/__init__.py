"""Timings against other libraries and hardware limits. Every ratio compares two timings of the same run."""
