"""Test checkpoints, each made once a session. Imports torch only when one is made."""

from __future__ import annotations

from pathlib import Path


class CheckpointMaker:
    """Called with the name of one of `checkpoints.VARIANTS`, returns its folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, variant: str) -> Path:
        from checkpoints import make_variant

        path = self._folder / variant
        return path if path.exists() else make_variant(self._folder, variant)
