"""From records to batches: record type, tokenizer, chat templates, encoding, packing, loading."""
