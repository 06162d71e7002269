"""Embeddings of media items in a preallocated pool: kept by the encoder that made them, read by prefill."""
