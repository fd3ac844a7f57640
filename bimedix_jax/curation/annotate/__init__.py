"""One annotation job with two tasks: `translate` (English records into Arabic) and `chats` (from exam questions)."""
