"""Test checkpoints, each made once a session. Imports torch only when one is made."""

from __future__ import annotations

from pathlib import Path


class CheckpointMaker:
    """Called with the name of one of `checkpoints.VARIANTS`, or of `sliding_checkpoint`, returns its folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, variant: str) -> Path:
        from checkpoints import make_variant
        from sliding_checkpoint import NAME, make_sliding_checkpoint

        path = self._folder / variant
        if path.exists():
            return path
        return make_sliding_checkpoint(path) if variant == NAME else make_variant(self._folder, variant)
