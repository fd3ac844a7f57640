"""Roles of the tokens of a conversation."""

ROLES = ("first", "template", "prompt", "answer")
"""The first FIRST positions, the template's own text, what is asked, and what the assistant says."""
FIRST = 4
"""Positions that are kept apart, because models attend to them whatever they are (arXiv 2309.17453)."""
