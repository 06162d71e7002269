"""The models that see whose answers are compared with `transformers`, each made once a session."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from answers import Answer, ask
from vision_checkpoints import make_gemma3, make_qwen2_5_vl
from vision_questions import NUM_TOKENS, Question, QuestionMaker
from vision_reference import load_vision_reference

from kvrelay_client import AsyncClient

MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "qwen2_5_vl": (make_qwen2_5_vl, {}),
    "gemma3": (make_gemma3, {}),
    "gemma3_crops": (make_gemma3, {"pan_and_scan": True}),
}


class VisionCase:
    def __init__(self, folder: Path, model: str) -> None:
        make, options = MODELS[model]
        self.model_dir: Path = make(folder / model, **options)
        self.reference = load_vision_reference(self.model_dir)
        self.maker = QuestionMaker(self.reference)
        self._about_videos: dict[str, Question] = {}

    def video_questions(self, names: Sequence[str]) -> list[Question]:
        for name in names:
            if name not in self._about_videos:
                self._about_videos[name] = self.maker.about_video(name)
        return [self._about_videos[name] for name in names]

    @cached_property
    def questions(self) -> list[Question]:
        return self.maker.every_layout()


class VisionCases:
    """Called with the name of one of `MODELS`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[str, VisionCase] = {}

    def __call__(self, model: str) -> VisionCase:
        if model not in self._made:
            self._made[model] = VisionCase(self._folder, model)
        return self._made[model]


async def ask_about(client: AsyncClient, *, max_tokens: int = NUM_TOKENS, **request: Any) -> Answer:
    """Greedily, up to the last token."""
    return await ask(client, max_tokens=max_tokens, temperature=0, ignore_eos=True, **request)
