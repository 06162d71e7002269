"""The engine: models, KV pool, prefix cache, scheduler, sampler, and both sides of the hand-off.

Runs in a process of its own; its service talks to it by the messages of `messages.py`. Knows nothing of gRPC.
"""
