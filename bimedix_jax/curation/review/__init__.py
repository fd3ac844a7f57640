"""Translations that a person looks at: what is sent, what comes back, and how far machine and people agree."""
