"""From medical text to batches: records, readers, tokenizer, chat templates, packing, loading."""
