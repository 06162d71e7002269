"""Explicit-state models of the hand-off protocol (docs/protocol.md), one file for each part of it.

Every model is a set of named steps over small immutable states. Each rule of the protocol that a model carries
is a switch of its `Rules`; with one of them off the explorer finds a shortest trace to what goes wrong.
`python -m protocol_model` from tests/support prints those traces. The models know nothing of the code they
describe: they are changed together with docs/protocol.md.
"""
