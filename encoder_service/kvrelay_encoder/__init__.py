"""The encoder service: media in, tickets for their embeddings out. No torch here; the engine is another process."""
