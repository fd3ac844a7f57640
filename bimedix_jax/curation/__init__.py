"""Makes records: readers, mixing, translation, synthesis of chats, review."""
