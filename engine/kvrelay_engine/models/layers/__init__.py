"""The layers that the dense decoder architectures share.

Shape suffixes in this package and its users:
N tokens of the batch, R rows that want logits, E hidden size, H query heads, K key/value heads, D head size,
Q = H * D, F intermediate size, V vocabulary, P positions, C = D / 2, O and I outputs and inputs of a projection.
"""
