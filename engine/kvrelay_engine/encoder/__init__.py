"""The engine of an encoder worker: images in, embeddings into a pool that others read."""
