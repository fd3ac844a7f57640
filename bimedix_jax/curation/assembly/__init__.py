"""Assembling the records of a recipe's sources."""
