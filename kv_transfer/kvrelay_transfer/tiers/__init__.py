"""Where KV and embeddings live on when a pool has no room for them: host memory, disk, Redis."""
