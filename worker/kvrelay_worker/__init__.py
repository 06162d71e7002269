"""What the worker services share: the engine client, the KV source, peers, attempts, server life. Imports no torch."""
