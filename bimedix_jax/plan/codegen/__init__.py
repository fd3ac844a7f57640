"""Inspection of compiled kernels, for accelerators that need not be present: registers, memory and FLOPs."""
