"""Inspection of compiled kernels, for accelerators that this machine need not have: registers, memory and FLOPs."""
