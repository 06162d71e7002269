"""Where images and videos stand in a prompt: the mark of each becomes as many placeholder tokens as the model has rows.

What the tokenizer must see is written into the text; the many placeholders, which are tokens of their own whatever
stands beside them, are put in afterwards, between ids. Equal to what transformers' processors make of the same text.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from kvrelay_core.errors import ConfigError, InvalidRequestError, UnsupportedError
from kvrelay_core.media.gemma_vision import num_views
from kvrelay_core.media.mrope import mrope_delta
from kvrelay_core.media.processor_config import GemmaProcessorConfig, ProcessorConfig, QwenProcessorConfig
from kvrelay_core.media.qwen_vision import Grid, image_grid, num_tokens, seconds_per_grid, video_grid
from kvrelay_core.media.video import VideoFrames
from kvrelay_core.request import MediaReference
from kvrelay_router.media_input import MediaInput
from kvrelay_router.tokenizer import Tokenizer

NO_GRID: Grid = (0, 0, 0)


@dataclass(frozen=True, slots=True)
class Kind:
    """Of media: image or video."""

    name: str
    token_id: int  # of a placeholder
    mark: str  # what a chat template writes for an item; empty without a tokenizer


@dataclass(frozen=True, slots=True)
class Run:
    """Placeholders of one view, as the request has them."""

    offset: int
    num_tokens: int  # one, or all


@dataclass(frozen=True, slots=True)
class View:
    """One run of placeholders."""

    content_hash: bytes
    kind: Kind
    num_tokens: int
    grid: Grid = NO_GRID
    first_row: int = 0
    seconds_per_grid: float = 0.0

    def placed(self, offset: int) -> MediaReference:
        return MediaReference(
            self.content_hash, offset, self.num_tokens, self.grid, self.first_row, self.seconds_per_grid
        )


class Placeholders(ABC):
    def __init__(self, image: Kind, video: Kind | None = None) -> None:
        """`video` is None where the model takes none."""
        self._image = image
        self._video = video
        self._kinds = [kind for kind in (image, video) if kind is not None]

    @abstractmethod
    def views(self, item: MediaInput) -> list[View]:
        """Raises InvalidRequestError for an item that the model cannot take, UnsupportedError for a kind."""

    def positions_ahead(self, media: Sequence[MediaReference]) -> int:
        """By how much the position of a token behind the prompt is above its index; 0 where it is not."""
        return 0

    def _replacement(self, item: MediaInput) -> str:
        """Of the item's mark, with one placeholder for each of its views."""
        return self._kind_of(item).mark

    def _kind_of(self, item: MediaInput) -> Kind:
        if not isinstance(item.content, VideoFrames):
            return self._image
        if self._video is None:
            raise UnsupportedError("media: this model takes no videos; send text and images only", field="media")
        return self._video

    def write(self, text: str, items: Sequence[MediaInput]) -> str:
        """The text with each mark replaced. Raises InvalidRequestError unless the marks are those of the items."""
        marks = [kind.mark for kind in self._kinds]
        pieces = re.split(f"({'|'.join(map(re.escape, marks))})", text)
        found, expected = pieces[1::2], [self._kind_of(item).mark for item in items]
        if len(found) != len(expected):
            raise InvalidRequestError(
                f"the prompt has {len(found)} marks {' or '.join(marks)} for {len(items)} images and videos; write one "
                "for each, in order, and none besides",
                field="media",
            )
        for index, (mark, wanted) in enumerate(zip(found, expected, strict=True)):
            if mark != wanted:
                raise InvalidRequestError(
                    f"mark {index} of the prompt is {mark}, that of media[{index}] is {wanted}; write them in the "
                    "order of the media",
                    field="media",
                )
        pieces[1::2] = map(self._replacement, items)
        return "".join(pieces)

    @property
    def token_id(self) -> int:
        """Of images."""
        return self._image.token_id

    @property
    def video_token_id(self) -> int | None:
        """None: the model takes no videos."""
        return None if self._video is None else self._video.token_id

    def expand(
        self, token_ids: Sequence[int], items: Sequence[MediaInput], runs: Sequence[Run] | None = None
    ) -> tuple[Sequence[int], tuple[MediaReference, ...]]:
        """With one placeholder for each view, or with all of them, as given; all of them are there afterwards.

        `runs` says where the views' placeholders are: any other token is itself, also one of a placeholder's id.
        Without, every placeholder is one of a view. Raises InvalidRequestError where they do not fit the views.
        """
        views = [view for item in items for view in self.views(item)]
        runs = self._find_runs(token_ids, views) if runs is None else runs
        if len(runs) != len(views):
            raise InvalidRequestError(
                f"{len(runs)} runs of placeholders are given, the request's media have {len(views)} views; give one "
                "for each, in order",
                field="placeholders",
            )
        return _lay_out(list(token_ids), views, runs)

    def _find_runs(self, token_ids: Sequence[int], views: Sequence[View]) -> list[Run]:
        """Each view's, where all placeholders are the views'."""
        total = sum(view.num_tokens for view in views)
        tokens = {kind.token_id for kind in self._kinds}
        places = [index for index, token in enumerate(token_ids) if token in tokens]
        if len(places) not in (len(views), total):
            raise InvalidRequestError(
                f"the prompt has {len(places)} placeholders (tokens {', '.join(map(str, sorted(tokens)))}), its media "
                f"need {len(views)} to be expanded here, or all {total}; where some are the model's own words, say in "
                "`placeholders` which are the media's",
                field="media",
            )
        runs, num_passed = list[Run](), 0
        for view in views:
            runs.append(Run(places[num_passed], view.num_tokens if len(places) == total else 1))
            num_passed += runs[-1].num_tokens
        return runs


def _lay_out(
    ids: list[int], views: Sequence[View], runs: Sequence[Run]
) -> tuple[list[int], tuple[MediaReference, ...]]:
    expanded, references, at = list[int](), [], 0
    for view, run in zip(views, runs, strict=True):
        first, count = run.offset, run.num_tokens
        if count not in (1, view.num_tokens) or first < at:
            raise InvalidRequestError(
                f"{count} placeholders are given at token {first}; this {view.kind.name} needs 1 to be expanded here "
                f"or all {view.num_tokens}, behind those of the item before it",
                field="placeholders",
            )
        if ids[first : first + count] != [view.kind.token_id] * count:
            raise InvalidRequestError(
                f"the placeholders from token {first} on are of another kind, or interrupted; this {view.kind.name} "
                f"needs {count} of {view.kind.token_id}, one after the other",
                field="media",
            )
        expanded += ids[at:first]
        references.append(view.placed(len(expanded)))
        expanded += [view.kind.token_id] * view.num_tokens
        at = first + count
    return expanded + ids[at:], tuple(references)


class QwenPlaceholders(Placeholders):
    def __init__(self, config: QwenProcessorConfig, tokenizer: Tokenizer | None) -> None:
        image = Kind("image", config.image_token_id, _text_of(config.image_token_id, tokenizer))
        video = None
        if config.video is not None:
            video = Kind("video", config.video.token_id, _text_of(config.video.token_id, tokenizer))
        super().__init__(image, video)
        self._config = config

    def views(self, item: MediaInput) -> list[View]:
        kind, (width, height) = self._kind_of(item), (item.header.width, item.header.height)
        if isinstance(item.content, VideoFrames):
            grid = video_grid(len(item.content.frames), width, height, self._config)
            seconds = seconds_per_grid(item.content.fps, self._config)
        else:
            grid, seconds = image_grid(width, height, self._config), 0.0
        return [View(item.content_hash, kind, num_tokens(grid, self._config), grid, seconds_per_grid=seconds)]

    def positions_ahead(self, media: Sequence[MediaReference]) -> int:
        return max(0, mrope_delta(media, self._config))


class GemmaPlaceholders(Placeholders):
    def __init__(self, config: GemmaProcessorConfig, tokenizer: Tokenizer | None) -> None:
        begin, image, end = (
            _text_of(token_id, tokenizer)
            for token_id in (config.begin_token_id, config.image_token_id, config.end_token_id)
        )
        super().__init__(Kind("image", config.image_token_id, begin))
        self._config = config
        self._view = f"\n\n{begin}{image}{end}\n\n"

    def views(self, item: MediaInput) -> list[View]:
        kind, tokens = self._kind_of(item), self._config.view_tokens
        return [
            View(item.content_hash, kind, tokens, first_row=index * tokens) for index in range(self._num_views(item))
        ]

    def _replacement(self, item: MediaInput) -> str:
        crops = self._num_views(item) - 1
        if not crops:
            return self._view
        # The words that the model was trained with.
        introduction = f"Here is the original image {self._view} and here are some crops to help you see better "
        return introduction + " ".join([self._view] * crops)

    def _num_views(self, item: MediaInput) -> int:
        return num_views(item.header.width, item.header.height, self._config)


def make_placeholders(config: ProcessorConfig | None, tokenizer: Tokenizer | None) -> Placeholders | None:
    """None for a model that takes no images. Raises ConfigError for a tokenizer that lacks the placeholders."""
    match config:
        case None:
            return None
        case QwenProcessorConfig():
            return QwenPlaceholders(config, tokenizer)
        case GemmaProcessorConfig():
            return GemmaPlaceholders(config, tokenizer)


def _text_of(token_id: int, tokenizer: Tokenizer | None) -> str:
    if tokenizer is None:
        return ""
    text = tokenizer.text_of(token_id)
    if not text:
        raise ConfigError(f"the tokenizer has no token {token_id}, which config.json names as one of its placeholders")
    return text
