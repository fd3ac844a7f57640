"""Generation, chat, padding and scoring. Each takes a routing plan and can return a routing record."""
