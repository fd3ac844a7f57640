"""What compilers of accelerators that are absent make of the kernels."""
