"""The other side of the comparison: `transformers` in this process, with its own KV cache, greedy."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from measured import Stream, Streams


class Reference:
    def __init__(self, model_dir: Path, num_threads: int) -> None:
        import transformers

        torch.set_num_threads(num_threads)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        loaded = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        self._model: Any = loaded.eval()
        self._model.generation_config.eos_token_id = None

    def one_after_another(self, prompts: list[list[int]], num_tokens: int) -> Streams:
        started_s = time.perf_counter()
        streams = tuple(self._generate([prompt], num_tokens) for prompt in prompts)
        return Streams(streams, time.perf_counter() - started_s)

    def as_one_batch(self, prompts: list[list[int]], num_tokens: int) -> Streams:
        """Prompts of one length, padded with nothing: the best case of a static batch."""
        started_s = time.perf_counter()
        stream = self._generate(prompts, num_tokens)
        return Streams((stream,) * len(prompts), time.perf_counter() - started_s)

    def answer(self, prompt: list[int], num_tokens: int) -> list[int]:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            tokens: list[int] = self._run(ids, num_tokens, None)[0, len(prompt) :].tolist()
        return tokens

    def _generate(self, prompts: list[list[int]], num_tokens: int) -> Stream:
        arrivals = Arrivals()
        with torch.inference_mode():
            self._run(torch.tensor(prompts), num_tokens, arrivals)
        return Stream(tuple(arrivals.times_s))

    def _run(self, ids: torch.Tensor, num_tokens: int, arrivals: Arrivals | None) -> torch.Tensor:
        mask = torch.ones_like(ids)
        answer: torch.Tensor = self._model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=num_tokens,
            do_sample=False,
            stopping_criteria=None if arrivals is None else [arrivals],
        )
        return answer


class Arrivals:
    """Called by `generate` after every token."""

    def __init__(self) -> None:
        self.started_s = time.perf_counter()
        self.times_s: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        self.times_s.append(time.perf_counter() - self.started_s)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)
