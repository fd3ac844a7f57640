"""Training: losses, optimiser, the compiled step, the loop around it, and the files of a run."""
