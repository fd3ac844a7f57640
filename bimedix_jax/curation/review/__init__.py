"""Review of translations by people: export of items, import of verdicts, and statistics of agreement."""
