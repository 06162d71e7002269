"""An answer that holds a placeholder token goes on in the next turn as any other answer does.

`transformers` takes every such token for an image's. So in this checkpoint another token has the same embedding, and
the reference is asked with that one where the model itself has said a placeholder.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cluster import Cluster
from vision_cases import MODELS, ask_about
from vision_checkpoints import alter_tensors
from vision_questions import MIN_MARGIN, NUM_TOKENS, QuestionMaker
from vision_reference import VisionReference, load_vision_reference

from kvrelay_core.errors import InvalidRequestError
from kvrelay_core.media.video import MediaContent

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300), pytest.mark.full]

TWIN = 7  # of the placeholder
SAID = (5, TWIN, TWIN, 6)


def make_twins(model_dir: Path, placeholder: int) -> None:
    def alter(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not name.endswith("embed_tokens.weight"):
            return tensor
        altered = tensor.clone()
        altered[TWIN] = tensor[placeholder]
        return altered

    alter_tensors(model_dir, alter)


def draw(reference: VisionReference) -> tuple[list[int], list[MediaContent], list[int]]:
    """A prompt with an image between what was said, its picture, and a decisive answer."""
    maker = QuestionMaker(reference)
    for index in range(20):
        question = maker.bare(f"said {index}", (20, "B", 9))
        ids = [*SAID, *question.ids, *SAID]
        answer, margin = reference.answer(ids, question.media, NUM_TOKENS)
        if TWIN not in question.ids and margin >= MIN_MARGIN and answer != question.answer:
            return ids, question.media, answer
    raise AssertionError("no decisive prompt found")


@pytest.mark.parametrize("model", ["qwen2_5_vl", "gemma3"])
async def test_encoder_exact_where_the_model_said_a_placeholder(tmp_path: Path, model: str) -> None:
    make, options = MODELS[model]
    model_dir = make(tmp_path / "model", **options)
    pad = load_vision_reference(model_dir).pad
    make_twins(model_dir, pad)
    ids, pictures, answer = draw(load_vision_reference(model_dir))
    first, size = ids.index(pad), ids.count(pad)
    expanded = [pad if token == TWIN else token for token in ids]
    collapsed = [*expanded[: first + 1], *expanded[first + size :]]
    with Cluster(model_dir, encoder=1, block_tokens=16, max_num_seqs=8, max_batched_tokens=24) as cluster:
        async with cluster.client() as client:
            for asked, length in ((expanded, size), (collapsed, 1)):
                got = await ask_about(client, token_ids=asked, media=pictures, placeholders=[(first, length)])
                assert got.token_ids == answer and got.end.usage.prompt_tokens == len(ids)
            with pytest.raises(InvalidRequestError, match="say in `placeholders` which are the media's"):
                await ask_about(client, token_ids=expanded, media=pictures)
        cluster.assert_no_leaks()
