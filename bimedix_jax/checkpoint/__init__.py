"""Reading and writing models: Hugging Face folders, GGUF files, native checkpoints and adapters."""
