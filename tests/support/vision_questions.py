"""Prompts with pictures and videos in every place, and the answers of `transformers`: to these, and with another one.

Each can be asked in several ways that must make one prompt of it. Their answers do not hang on rounding.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from string import ascii_lowercase
from typing import Any

from checkpoint_tokenizer import SPECIAL_TOKENS
from video_frames import draw_frames, encode_frames
from vision_checkpoints import VOCAB_SIZE, as_bytes, draw_picture
from vision_reference import VisionReference

from kvrelay_core.media.video import MediaContent, VideoFrames

NUM_TOKENS = 8
MIN_MARGIN = 1e-3  # between the best two logits of every token: far above what rounding does
_MAX_SEEDS = 50
# Two crops, none, and three to a model that crops; all of different sizes to one that takes them as they are.
SIZES = {"A": (64, 40), "B": (48, 48), "C": (31, 100)}
PICTURES = {name: as_bytes(draw_picture(*size, seed=index)) for index, (name, size) in enumerate(SIZES.items())}
OTHERS = {name: as_bytes(draw_picture(*size, seed=9 + index)) for index, (name, size) in enumerate(SIZES.items())}
# Of an even and of an odd number of frames; to the other one they come in another order, or at another rate.
_FRAMES = {"V": tuple(encode_frames(draw_frames(4, 40, 28))), "W": tuple(encode_frames(draw_frames(5, 27, 34)))}
VIDEOS = {"V": VideoFrames(_FRAMES["V"], 2.0), "W": VideoFrames(_FRAMES["W"], 3.0)}
OTHER_VIDEOS = {"V": VideoFrames(_FRAMES["V"][::-1], 2.0), "W": VideoFrames(_FRAMES["W"], 1.0)}
MEDIA: dict[str, MediaContent] = {**PICTURES, **VIDEOS}
OTHER_MEDIA: dict[str, MediaContent] = {**OTHERS, **OTHER_VIDEOS}

Layout = Sequence[int | str]  # so much text, or the name of a picture or a video
CHATS: dict[str, Layout] = {
    "middle": (20, "A", 30),
    "first": ("A", 40),
    "last": (30, "A"),
    "three": ("C", 60, "A", 12, "B", 9),
    "adjacent": (10, "A", "B", "C", 14),
    "twice": (5, "B", 20, "B", 7),
}
VIDEO_CHATS: dict[str, Layout] = {
    "video": (20, "V", 30),
    "odd video": ("W", 40),
    "video, image": (10, "V", 7, "A", 14),
    "image, video": (10, "A", 7, "V", 14),
    "two videos": (5, "V", 9, "B", 3, "W", 5),
}
# Nothing but placeholders at either end: the first or the last token of all is an image's.
BARE: dict[str, Layout] = {"very first": ("B", 25), "very last": (25, "B")}
VIDEO_BARE: dict[str, Layout] = {"video very first": ("V", 25), "video very last": (25, "W")}
VIDEO_LAYOUTS = (*VIDEO_CHATS, *VIDEO_BARE)


@dataclass
class Question:
    name: str
    ids: list[int]  # with all placeholders
    collapsed: list[int]  # with one for each view
    media: list[MediaContent]
    others: list[MediaContent]  # the same, but for the last one
    parts: list[dict[str, Any]] = field(default_factory=list)  # of the one message that makes these ids, if one does
    text: str = ""  # the same, as the chat template writes it
    answer: list[int] = field(default_factory=list)
    other_answer: list[int] = field(default_factory=list)

    def messages(self, media: Sequence[MediaContent]) -> list[dict[str, Any]]:
        left = iter(media)
        content = [part if part["type"] == "text" else {**part, part["type"]: next(left)} for part in self.parts]
        return [{"role": "user", "content": content}]

    def ways(self) -> list[dict[str, Any]]:
        """To ask it, as options of a request; by messages first, where that can be done."""
        by_ids = [{"token_ids": ids, "media": self.media} for ids in (self.ids, self.collapsed)]
        if not self.parts:
            return by_ids
        return [{"messages": self.messages(self.media)}, {"prompt": self.text, "media": self.media}, *by_ids]

    def other(self) -> dict[str, Any]:
        """To ask it with another picture or video."""
        if self.parts:
            return {"messages": self.messages(self.others)}
        return {"token_ids": self.ids, "media": self.others}


class QuestionMaker:
    def __init__(self, reference: VisionReference, num_tokens: int = NUM_TOKENS) -> None:
        """`num_tokens` of each answer."""
        self._reference = reference
        self._num_tokens = num_tokens

    def every_layout(self) -> list[Question]:
        """Of pictures."""
        chats = [self.chat(name, layout) for name, layout in CHATS.items()]
        return chats + [self.bare(name, layout) for name, layout in BARE.items()]

    def about_video(self, name: str) -> Question:
        """One of `VIDEO_LAYOUTS`."""
        return self.chat(name, VIDEO_CHATS[name]) if name in VIDEO_CHATS else self.bare(name, VIDEO_BARE[name])

    def chat(self, name: str, layout: Layout) -> Question:
        """A message with text, pictures and videos."""

        def make(generator: random.Random) -> Question:
            parts: list[dict[str, Any]] = [
                {"type": "text", "text": _text(generator, part)}
                if isinstance(part, int)
                else {"type": "video" if part in VIDEOS else "image"}
                for part in layout
            ]
            media, others = _media(layout)
            text, ids = self._reference.prompt([{"role": "user", "content": parts}], media)
            return Question(name, ids, self._collapse(ids, media), media, others, parts, text)

        return self._decisive(name, make)

    def bare(self, name: str, layout: Layout, after: Question | None = None) -> Question:
        """Tokens: any, and those of media of one view with nothing around them. `after` that question's answer."""

        def make(generator: random.Random) -> Question:
            media, others = _media(layout)
            ids: list[int] = []
            if after is not None:
                ids = [*after.ids, *after.answer]
                others = [*(after.media if media else after.others), *others]
                media = [*after.media, *media]
            for part in layout:
                if isinstance(part, int):
                    ids += [generator.randrange(VOCAB_SIZE - 2 * len(SPECIAL_TOKENS)) for _ in range(part)]
                else:
                    [size] = self._reference.num_placeholders(MEDIA[part])
                    ids += [self._reference.pad_of(MEDIA[part])] * size
            return Question(name, ids, self._collapse(ids, media), media, others)

        return self._decisive(name, make)

    def spliced(self, name: str, first: Question, num_tokens: int, layout: Layout) -> Question:
        """The first question's first tokens, which have all its pictures, and others behind them."""
        begun = Question(name, first.ids[:num_tokens], [], first.media, first.others)
        return self.bare(name, layout, begun)

    def _collapse(self, ids: Sequence[int], media: Sequence[MediaContent]) -> list[int]:
        sizes = [size for item in media for size in self._reference.num_placeholders(item)]
        collapsed, at = list[int](), 0
        while at < len(ids):
            collapsed.append(ids[at])
            at += sizes.pop(0) if ids[at] in self._reference.pads else 1
        assert not sizes
        return collapsed

    def _decisive(self, name: str, make: Callable[[random.Random], Question]) -> Question:
        for seed in range(_MAX_SEEDS):
            question = make(random.Random(f"{name} {seed}"))
            question.answer, margin = self._reference.answer(question.ids, question.media, self._num_tokens)
            question.other_answer, other = self._reference.answer(question.ids, question.others, self._num_tokens)
            # A placeholder in an answer that is asked on would be taken for a picture's.
            is_clear = min(margin, other) >= MIN_MARGIN and not set(self._reference.pads) & set(question.answer)
            if is_clear and question.answer != question.other_answer:
                return question
        raise AssertionError(f"no prompt laid out as {name!r} has a decisive answer")


def usable_prefix(reference: VisionReference, ids: Sequence[int], num_shared: int, unit_tokens: int) -> int:
    """The longest prefix in whole units that leaves a token and, where images are kept whole, splits none."""

    def splits(cut: int) -> bool:
        return reference.whole_runs and ids[cut - 1] == ids[cut] == reference.pad

    cuts = range(0, min(num_shared + 1, len(ids)), unit_tokens)
    return max(cut for cut in cuts if cut == 0 or not splits(cut))


def _text(generator: random.Random, num_letters: int) -> str:
    return "".join(generator.choices(ascii_lowercase + " ", k=num_letters))


def _media(layout: Layout) -> tuple[list[MediaContent], list[MediaContent]]:
    """And the same with another one in the last one's place."""
    names = [part for part in layout if isinstance(part, str)]
    media = [MEDIA[name] for name in names]
    return media, [*media[:-1], OTHER_MEDIA[names[-1]]] if names else list(media)
