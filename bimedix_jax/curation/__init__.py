"""What makes records: readers, mixing, translation, synthesis of chats, review."""
