"""`transformers` with the whole model in this process, greedy: images are encoded in the step of their prompt."""

from __future__ import annotations

import time
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from checkpoints import quiet_transformers
from encoder_questions import PAD, Question, Questions
from measured import Stream
from PIL import Image
from relay_reference import Arrivals


class Reference:
    def __init__(self, model_dir: Path) -> None:
        import transformers
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        with quiet_transformers():
            self._model: Any = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
                model_dir, dtype=torch.float32
            ).eval()
        self._processor: Any = Qwen2VLImageProcessorPil.from_pretrained(model_dir)

    def use_threads(self, num_threads: int) -> None:
        """And warms up."""
        torch.set_num_threads(num_threads)
        self.ask(Questions(num_threads).new(1), 2)

    def ask(self, question: Question, num_tokens: int) -> tuple[list[int], Stream]:
        """The answer, and when its tokens came after the call."""
        started_s = time.perf_counter()
        arrivals = Arrivals()
        inputs: dict[str, Any] = {}
        sizes: list[int] = []
        if question.pictures:
            images = [Image.open(BytesIO(data)) for data in question.pictures]
            inputs = dict(self._processor(images, return_tensors="pt"))
            sizes = (inputs["image_grid_thw"].prod(-1) // 4).tolist()
        ids = [each for token in question.token_ids for each in ([token] * sizes.pop(0) if token == PAD else [token])]
        input_ids = torch.tensor([ids])
        if question.pictures:
            inputs["mm_token_type_ids"] = (input_ids == PAD).int()
        with torch.inference_mode():
            out = self._model.generate(
                input_ids=input_ids, attention_mask=torch.ones_like(input_ids), do_sample=False,
                max_new_tokens=num_tokens, min_new_tokens=num_tokens, eos_token_id=None, pad_token_id=0,
                stopping_criteria=[arrivals], **inputs,
            )  # fmt: skip
        lag_s = arrivals.started_s - started_s
        return out[0, len(ids) :].tolist(), Stream(tuple(lag_s + at_s for at_s in arrivals.times_s))
