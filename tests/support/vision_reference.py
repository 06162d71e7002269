"""`transformers` on the whole, for the checkpoints of `vision_checkpoints`: processor, tower and text model.

It answers greedily, and says how far the answer hangs on rounding. Knows nothing of what is tested, but for the pixels
of videos.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from checkpoint_tokenizer import BEGIN_OF_TEXT, END_OF_TEXT, media_token_id
from checkpoints import quiet_transformers
from PIL import Image
from rope_reference import count_time
from vision_checkpoints import GEMMA_TOKENS, QWEN_TOKENS, VOCAB_SIZE

from kvrelay_core.media.video import MediaContent, VideoFrames
from kvrelay_engine.vision.loader import load_tower


class VisionReference(ABC):
    """Prompts are token ids with all placeholders; media are files of pictures, and frames of videos."""

    begin: int  # the token before an image's placeholders
    pad: int  # the placeholder of an image
    end: int  # the token behind them
    whole_runs: bool  # tokens of an image see each other

    def __init__(self, model_dir: Path) -> None:
        torch.set_num_threads(1)
        self._tokenizer = _load_tokenizer(model_dir, self._named_tokens())
        self._images: Any
        self._processor: Any
        self._model: Any

    def prompt(self, turns: Sequence[dict[str, Any]], media: Sequence[MediaContent]) -> tuple[str, list[int]]:
        """The text of a conversation as the chat template writes it, and its ids."""
        text = self._tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True)
        pictures = [_opened(item) for item in media if isinstance(item, bytes)]
        inputs = self._processor(text=[text], images=pictures, **self._options())
        return text, list(inputs["input_ids"][0])

    def pad_of(self, item: MediaContent) -> int:
        """The placeholder of such an item."""
        assert isinstance(item, bytes), "a family that takes videos says more"
        return self.pad

    @property
    def pads(self) -> tuple[int, ...]:
        return (self.pad,)

    def answer(self, ids: Sequence[int], media: Sequence[MediaContent], num_tokens: int) -> tuple[list[int], float]:
        """The greedy answer, and the least margin between the best two logits of its tokens."""
        if ids[-1] not in self.pads:
            return self._generate(ids, media, num_tokens)
        # `generate` takes the type of the prompt's last token for that of the tokens it makes: it would take them for
        # more of the image. So each is made from the beginning here.
        answer, margins = list[int](), []
        for _ in range(num_tokens):
            token, margin = self._generate([*ids, *answer], media, 1)
            answer += token
            margins.append(margin)
        return answer, min(margins)

    def _generate(self, ids: Sequence[int], media: Sequence[MediaContent], num_tokens: int) -> tuple[list[int], float]:
        input_ids = torch.tensor([ids])
        types = sum(number * (input_ids == pad).int() for number, pad in enumerate(self.pads, 1))
        with quiet_transformers(), torch.inference_mode():
            out = self._model.generate(
                input_ids=input_ids, attention_mask=torch.ones_like(input_ids), do_sample=False,
                max_new_tokens=num_tokens, min_new_tokens=num_tokens, eos_token_id=None, pad_token_id=0,
                return_dict_in_generate=True, output_logits=True,
                **{self._token_types: types}, **self._pixels(media),
            )  # fmt: skip
        best = torch.stack(out.logits)[:, 0].topk(2).values
        return out.sequences[0, len(ids) :].tolist(), float((best[:, 0] - best[:, 1]).min())

    def num_placeholders(self, item: MediaContent) -> list[int]:
        """Of each of its views."""
        assert isinstance(item, bytes), "a family that takes videos says more"
        return self._sizes(self._look(item))

    def _pixels(self, media: Sequence[MediaContent]) -> dict[str, torch.Tensor]:
        seen = [self._look(item) for item in media if isinstance(item, bytes)]
        return {name: torch.cat([one[name] for one in seen]) for name in self._inputs} if seen else {}

    def _look(self, picture: bytes) -> dict[str, torch.Tensor]:
        return dict(self._images([_opened(picture)], return_tensors="pt", **self._options()))

    _token_types: str  # what `generate` calls them
    _inputs: tuple[str, ...]  # of `generate`, from the image processor

    @abstractmethod
    def _named_tokens(self) -> dict[str, str]:
        """As the family's processor asks the tokenizer for them."""

    @abstractmethod
    def _sizes(self, seen: dict[str, torch.Tensor]) -> list[int]:
        """Placeholders of each view of one picture."""

    def _options(self) -> dict[str, Any]:
        """Of the processor, where its own defaults hide those of the checkpoint."""
        return {}


class QwenVisionReference(VisionReference):
    begin, pad, video_pad, end = (media_token_id(token, QWEN_TOKENS, VOCAB_SIZE) for token in QWEN_TOKENS)
    whole_runs = False
    _token_types = "mm_token_type_ids"
    _inputs = ("pixel_values", "image_grid_thw")

    def __init__(self, model_dir: Path) -> None:
        import transformers
        from media_checkpoints import QwenImagesOnly
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        super().__init__(model_dir)
        self._images = Qwen2VLImageProcessorPil.from_pretrained(model_dir)
        self._processor = QwenImagesOnly(self._images, self._tokenizer)
        self._videos = load_tower(str(model_dir), "float32", "cpu").processor
        with quiet_transformers():
            self._model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
                model_dir, dtype=torch.float32
            ).eval()
        count_time(self._model.model)

    def _named_tokens(self) -> dict[str, str]:
        return {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}

    def _sizes(self, seen: dict[str, torch.Tensor]) -> list[int]:
        return [int(seen["image_grid_thw"].prod()) // self._images.merge_size**2]

    def prompt(self, turns: Sequence[dict[str, Any]], media: Sequence[MediaContent]) -> tuple[str, list[int]]:
        """Its processor lays images out; with videos it needs torchvision."""
        if not any(isinstance(item, VideoFrames) for item in media):
            return super().prompt(turns, media)
        text = self._tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True)
        left, ids = iter(media), list[int]()
        for token in self._tokenizer(text)["input_ids"]:
            ids += [token] * (self.num_placeholders(next(left))[0] if token in self.pads else 1)
        assert next(left, None) is None
        return text, ids

    def pad_of(self, item: MediaContent) -> int:
        return self.video_pad if isinstance(item, VideoFrames) else self.pad

    @property
    def pads(self) -> tuple[int, ...]:
        return (self.pad, self.video_pad)

    def num_placeholders(self, item: MediaContent) -> list[int]:
        if not isinstance(item, VideoFrames):
            return super().num_placeholders(item)
        return [math.prod(self._grid(item)) // self._images.merge_size**2]

    def _pixels(self, media: Sequence[MediaContent]) -> dict[str, torch.Tensor]:
        """Those of videos are ours, which equal those of its own processor by vectors made where that one runs."""
        videos = [item for item in media if isinstance(item, VideoFrames)]
        if not videos:
            return super()._pixels(media)
        return {
            **super()._pixels(media),
            "pixel_values_videos": torch.cat([self._videos.process(video).pixels for video in videos]),
            "video_grid_thw": torch.tensor([self._grid(video) for video in videos]),
            "second_per_grid_ts": torch.tensor([self._images.temporal_patch_size / video.fps for video in videos]),
        }

    def _grid(self, video: VideoFrames) -> tuple[int, int, int]:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        images, (width, height) = self._images, _opened(video.frames[0]).size
        side, size = images.patch_size * images.merge_size, images.size
        rows, columns = smart_resize(height, width, side, size["shortest_edge"], size["longest_edge"])
        steps = -(-len(video.frames) // images.temporal_patch_size)
        return steps, rows // images.patch_size, columns // images.patch_size


class GemmaVisionReference(VisionReference):
    begin, pad, end = (media_token_id(token, GEMMA_TOKENS, VOCAB_SIZE) for token in GEMMA_TOKENS)
    whole_runs = True
    _token_types = "token_type_ids"
    _inputs = ("pixel_values",)

    def __init__(self, model_dir: Path) -> None:
        import transformers
        from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
        from transformers.models.gemma3.processing_gemma3 import Gemma3Processor

        super().__init__(model_dir)
        self._settings: dict[str, Any] = json.loads((model_dir / "preprocessor_config.json").read_text())
        self._view_tokens = int(self._settings["image_seq_length"])
        self._images = Gemma3ImageProcessorPil.from_pretrained(model_dir)
        self._processor = Gemma3Processor(self._images, self._tokenizer, image_seq_length=self._view_tokens)
        with quiet_transformers():
            self._model = transformers.Gemma3ForConditionalGeneration.from_pretrained(
                model_dir, dtype=torch.float32
            ).eval()

    def _named_tokens(self) -> dict[str, str]:
        begin, image, end = GEMMA_TOKENS
        return {"boi_token": begin, "image_token": image, "eoi_token": end}

    def _sizes(self, seen: dict[str, torch.Tensor]) -> list[int]:
        return [self._view_tokens] * len(seen["pixel_values"])

    def _options(self) -> dict[str, Any]:
        pan = {name: value for name, value in self._settings.items() if name.startswith("pan_and_scan_")}
        return {"do_pan_and_scan": bool(self._settings["do_pan_and_scan"]), **pan}


def load_vision_reference(model_dir: Path) -> VisionReference:
    families = {"qwen2_5_vl": QwenVisionReference, "gemma3": GemmaVisionReference}
    return families[json.loads((model_dir / "config.json").read_text())["model_type"]](model_dir)


def _opened(picture: bytes) -> Image.Image:
    return Image.open(BytesIO(picture))


def _load_tokenizer(model_dir: Path, named: dict[str, str]) -> Any:
    from transformers import PreTrainedTokenizerFast

    settings = json.loads((model_dir / "tokenizer_config.json").read_text())
    return PreTrainedTokenizerFast(
        tokenizer_file=str(model_dir / "tokenizer.json"),
        bos_token=BEGIN_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        extra_special_tokens=named,
        chat_template=settings["chat_template"],
    )
