"""Checks of a translation that need no model: rules, each of which raises a named flag."""
