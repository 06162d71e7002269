"""The prefill service: prompt in; KV cache, first token and a ticket to the KV out. Imports no torch."""
