"""Generation, chat, padding and scoring; each takes a routing plan and can return the record."""
