"""Training: losses, optimiser, the compiled step, the loop around it, and what a run writes down."""
