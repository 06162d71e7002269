"""The decode service: a ticket in, tokens out. Imports no torch."""
