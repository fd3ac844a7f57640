"""Evaluation: held-out loss and multiple choice, per language, with counts and confidence intervals."""
