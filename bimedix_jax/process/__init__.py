"""The process itself: how Ctrl-C and SIGTERM end it, and which process writes a folder."""
