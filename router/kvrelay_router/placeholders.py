"""Where images stand in a prompt: each one's mark becomes as many placeholder tokens as the model has rows for it.

What the tokenizer must see is written into the text; the many placeholders, which are tokens of their own whatever
stands beside them, are put in afterwards, between ids. Equal to what transformers' processors make of the same text.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from kvrelay_core.errors import ConfigError, InvalidRequestError
from kvrelay_core.media.gemma_vision import num_views
from kvrelay_core.media.processor_config import GemmaProcessorConfig, ProcessorConfig, QwenProcessorConfig
from kvrelay_core.media.qwen_vision import Grid, image_grid, num_tokens
from kvrelay_core.request import MediaReference
from kvrelay_router.media_input import MediaInput
from kvrelay_router.tokenizer import Tokenizer

NO_GRID: Grid = (0, 0, 0)


@dataclass(frozen=True, slots=True)
class View:
    """One run of placeholders."""

    content_hash: bytes
    num_tokens: int
    grid: Grid = NO_GRID
    first_row: int = 0


class Placeholders(ABC):
    def __init__(self, image_token_id: int, mark: str) -> None:
        """`mark` is what a chat template writes for an image; empty without a tokenizer."""
        self._image_token_id = image_token_id
        self._mark = mark

    @abstractmethod
    def views(self, item: MediaInput) -> list[View]:
        """Raises InvalidRequestError for an image that the model cannot take."""

    @abstractmethod
    def _replacement(self, item: MediaInput) -> str:
        """Of the image's mark, with one placeholder for each of its views."""

    def write(self, text: str, items: Sequence[MediaInput]) -> str:
        """The text with each mark replaced. Raises InvalidRequestError unless there are as many marks as images."""
        pieces = text.split(self._mark)
        if len(pieces) - 1 != len(items):
            raise InvalidRequestError(
                f"the prompt has {len(pieces) - 1} marks {self._mark} for {len(items)} images; write one for each "
                "image, in order, and none besides",
                field="media",
            )
        replaced = [
            piece for item, piece in zip(items, pieces[1:], strict=True) for piece in (self._replacement(item), piece)
        ]
        return "".join((pieces[0], *replaced))

    def expand(
        self, token_ids: Sequence[int], items: Sequence[MediaInput]
    ) -> tuple[Sequence[int], tuple[MediaReference, ...]]:
        """With one placeholder for each view, or with all of them, as given; all of them are there afterwards.

        Raises InvalidRequestError for any other number of placeholders.
        """
        views = [view for item in items for view in self.views(item)]
        ids, total = list(token_ids), sum(view.num_tokens for view in views)
        found = ids.count(self._image_token_id)
        if found not in (len(views), total):
            raise InvalidRequestError(
                f"the prompt has {found} placeholders (token {self._image_token_id}), its images need {len(views)} to "
                f"be expanded here, or all {total}",
                field="media",
            )
        return self._lay_out(ids, views, is_expanded=found == total)

    def _lay_out(
        self, ids: list[int], views: list[View], *, is_expanded: bool
    ) -> tuple[list[int], tuple[MediaReference, ...]]:
        token, expanded, references, at = self._image_token_id, list[int](), [], 0
        for view in views:
            first = ids.index(token, at)
            end = first + (view.num_tokens if is_expanded else 1)
            if ids[first:end].count(token) != end - first:
                raise InvalidRequestError(
                    f"the placeholders from token {first} on are interrupted; this image needs {view.num_tokens} of "
                    "them one after the other",
                    field="media",
                )
            expanded += ids[at:first]
            references.append(
                MediaReference(view.content_hash, len(expanded), view.num_tokens, view.grid, view.first_row)
            )
            expanded += [token] * view.num_tokens
            at = end
        return expanded + ids[at:], tuple(references)


class QwenPlaceholders(Placeholders):
    def __init__(self, config: QwenProcessorConfig, tokenizer: Tokenizer | None) -> None:
        super().__init__(config.image_token_id, _text_of(config.image_token_id, tokenizer))
        self._config = config

    def views(self, item: MediaInput) -> list[View]:
        grid = image_grid(item.header.width, item.header.height, self._config)
        return [View(item.content_hash, num_tokens(grid, self._config), grid)]

    def _replacement(self, item: MediaInput) -> str:
        return self._mark


class GemmaPlaceholders(Placeholders):
    def __init__(self, config: GemmaProcessorConfig, tokenizer: Tokenizer | None) -> None:
        begin, image, end = (
            _text_of(token_id, tokenizer)
            for token_id in (config.begin_token_id, config.image_token_id, config.end_token_id)
        )
        super().__init__(config.image_token_id, begin)
        self._config = config
        self._view = f"\n\n{begin}{image}{end}\n\n"

    def views(self, item: MediaInput) -> list[View]:
        tokens = self._config.view_tokens
        return [View(item.content_hash, tokens, NO_GRID, index * tokens) for index in range(self._num_views(item))]

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
