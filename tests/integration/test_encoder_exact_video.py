"""Answers about videos through router, encoder, prefill and decode processes equal those of `transformers`.

Videos of even and odd numbers of frames, alone, twice, and with pictures before and behind; their frames in another
order, or at another rate, which gives another answer. `transformers` is given pixels that were made here, since its own
video processor needs torchvision; vectors show that they are the same (`tests/golden`). Positions are its own.
"""

from __future__ import annotations

from itertools import product

import pytest
from cluster import Cluster
from vision_cases import VisionCases
from vision_checks import CONNECTORS, GRAINS, POOLS, check_all_at_once, check_cold, check_shared_beginnings, check_warm
from vision_questions import VIDEO_LAYOUTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

SAMPLED = ("shm", "chunked")
FEW = ("odd video", "video, image", "image, video")  # what a cell that runs with every change is asked


def cells() -> list[object]:
    return [
        pytest.param(*cell, id="-".join(cell), marks=[] if cell == SAMPLED else [pytest.mark.full])
        for cell in product(CONNECTORS, GRAINS)
    ]


@pytest.mark.parametrize(("connector", "grain"), cells())
async def test_encoder_exact_video(vision_cases: VisionCases, connector: str, grain: str) -> None:
    case = vision_cases("qwen2_5_vl")
    questions = case.video_questions(FEW if (connector, grain) == SAMPLED else VIDEO_LAYOUTS)
    with Cluster(case.model_dir, encoder=1, connector=connector, **POOLS, **GRAINS[grain]) as cluster:
        async with cluster.client() as client:
            await check_cold(client, questions)
            await check_warm(client, case, questions)
            await check_all_at_once(client, questions)
            await check_shared_beginnings(client, case, "W")
        cluster.assert_no_leaks()
