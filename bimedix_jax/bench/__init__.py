"""Timings against peers and hardware limits; every ratio compares two timings of the same run."""
