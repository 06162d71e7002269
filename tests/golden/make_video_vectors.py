"""Makes video_vectors.npz anew: what `transformers`' own video processor makes of the cases of `video_vectors`.

    PYTHONPATH=tests/support python tests/golden/make_video_vectors.py tests/golden/video_vectors.npz

Needs torchvision, and transformers of any version that has Qwen2VLVideoProcessor. Nothing of KVRelay is used.
"""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from video_vectors import CASES, RATES, VideoCase

SPECIAL_TOKENS = ("<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>", "<|im_end|>")


def main(path: str) -> None:
    arrays: dict[str, Any] = {"origin": json.dumps(origin()), "seconds_per_grid": seconds_per_grid()}
    for name, case in CASES.items():
        pixels, grid = process(case)
        arrays[name] = pixels[:: case.every].numpy()
        arrays[f"{name}/grid"] = grid.numpy()
        arrays[f"{name}/num_rows"] = np.array(len(pixels))
        print(f"{name}: grid {grid.tolist()}, {len(pixels)} rows")
    np.savez_compressed(path, **arrays)


def process(case: VideoCase) -> tuple[torch.Tensor, torch.Tensor]:
    processor = Qwen2VLVideoProcessor(**case.settings)
    out = processor(videos=[case.frames], return_tensors="pt", do_sample_frames=False)
    return out["pixel_values_videos"].float(), out["video_grid_thw"][0]


def seconds_per_grid() -> np.ndarray[Any, Any]:
    """As the whole processor hands them to the model, for each of the rates."""
    case = CASES["as it is"]
    processor = whole_processor(Qwen2VLVideoProcessor(**case.settings))
    found = []
    for rate in RATES:
        metadata = {"total_num_frames": case.size[0], "fps": rate, "frames_indices": list(range(case.size[0]))}
        inputs = processor(
            text=["<|vision_start|><|video_pad|><|vision_end|>"], videos=[case.frames],
            video_metadata=[metadata], do_sample_frames=False, return_tensors="pt",
        )  # fmt: skip
        seconds = torch.as_tensor(inputs["second_per_grid_ts"])
        grid = inputs["video_grid_thw"][0]
        num_tokens = int((inputs["input_ids"] == SPECIAL_TOKENS.index("<|video_pad|>")).sum())
        assert num_tokens == int(grid.prod()) // 4, f"{num_tokens} placeholders for a grid of {grid.tolist()}"
        print(f"{rate} frames a second: {seconds.dtype} {seconds.tolist()}, {num_tokens} placeholders")
        found.append(float(seconds[0]))
    return np.array(found)


def whole_processor(videos: Qwen2VLVideoProcessor) -> Any:
    vocabulary = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|im_end|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>",
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    )  # fmt: skip
    return transformers.Qwen2_5_VLProcessor(transformers.Qwen2VLImageProcessor(), fast, videos)


def origin() -> dict[str, str]:
    return {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


if __name__ == "__main__":
    main(sys.argv[1])
