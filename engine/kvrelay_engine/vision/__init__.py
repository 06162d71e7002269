"""The image side of vision-language models: from the bytes of a picture to embeddings for the text model.

A family is a folder with `config.py`, `weights.py`, `tower.py` and `processor.py`, and an entry in `registry.py`.
Nothing here knows of prompts, placeholders, requests or hand-offs.

Shape suffixes in this package: N patches of the batch, M merged patches (embeddings) of the batch, B pictures of
one size, E hidden size, H heads, D head size, C colours, S side of a picture in pixels, O and I outputs and inputs
of a projection.
"""
