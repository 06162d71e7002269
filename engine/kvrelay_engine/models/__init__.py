"""The architectures. Each has the same three files: `config.py` (config.json to ModelConfig), `weights.py`
(checkpoint tensors to layer weights) and `model.py` (the layers). `registry.py` lists them.
"""
