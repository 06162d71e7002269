"""Answers about pictures through router, encoder, prefill and decode processes equal those of `transformers`.

A cell of the matrix is one cluster. It is asked prompts with pictures in every place: one by one (cold), with another
picture in the same place, in every way that makes the same prompt (out of every cache), all at once, and prompts that
share a beginning which ends inside a picture.
"""

from __future__ import annotations

from itertools import product

import pytest
from cluster import Cluster
from vision_cases import MODELS, VisionCases
from vision_checks import CONNECTORS, GRAINS, POOLS, check_all_at_once, check_cold, check_shared_beginnings, check_warm

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

LIBRARIES = ("nixl", "ucx")  # what they carry is the same in every grain: one of them has chunks
# Both families and connectors, in the grains that cut most; the full run has the rest.
SAMPLED = {("qwen2_5_vl", "shm", "chunked"), ("gemma3_crops", "grpc", "crumbs")}


def cells() -> list[object]:
    return [
        pytest.param(*cell, id="-".join(cell), marks=[] if cell in SAMPLED else [pytest.mark.full])
        for cell in (*product(MODELS, CONNECTORS, GRAINS), *product(MODELS, LIBRARIES, ("chunked",)))
    ]


@pytest.mark.parametrize(("model", "connector", "grain"), cells())
async def test_encoder_exact_matrix(vision_cases: VisionCases, model: str, connector: str, grain: str) -> None:
    case = vision_cases(model)
    with Cluster(case.model_dir, encoder=1, connector=connector, **POOLS, **GRAINS[grain]) as cluster:
        async with cluster.client() as client:
            await check_cold(client, case.questions)
            await check_warm(client, case, case.questions)
            await check_all_at_once(client, case.questions)
            await check_shared_beginnings(client, case, "B")
        cluster.assert_no_leaks()
