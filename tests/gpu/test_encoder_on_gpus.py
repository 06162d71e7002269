"""Encoder, prefill and decode workers on GPUs answer as `transformers` does on the CPU, in float32, token by token.

On a machine with two GPUs the encoder and decode share the second one; with one, all three share it.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from cluster import Cluster
from vision_cases import MODELS, VisionCases, ask_about

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.cluster,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]


def flags() -> dict[str, Any]:
    other = torch.cuda.device_count() - 1 and 1
    devices = {"prefill_devices": 0, "decode_devices": other, "encoder_devices": other}
    return {"device": "cuda", "dtype": "float32", "block_tokens": 16, "max_num_seqs": 8, "kv_blocks": 512, **devices}


@pytest.mark.parametrize("max_batched_tokens", [2048, 24], ids=["whole", "chunked"])
@pytest.mark.parametrize("model", MODELS)
async def test_encoder_exact_on_gpus(vision_cases: VisionCases, model: str, max_batched_tokens: int) -> None:
    case = vision_cases(model)
    with Cluster(case.model_dir, encoder=1, max_batched_tokens=max_batched_tokens, **flags()) as cluster:
        async with cluster.client() as client:
            for question in case.questions:
                cold = await ask_about(client, **question.ways()[0])
                assert cold.token_ids == question.answer, question.name
                assert (await ask_about(client, **question.other())).token_ids == question.other_answer, question.name
            again = [question for question in case.questions for _ in question.ways()]
            asked = [ask_about(client, **way) for question in case.questions for way in question.ways()]
            answers = await asyncio.gather(*asked)
            assert [answer.token_ids for answer in answers] == [question.answer for question in again]
        assert cluster.describe("encoder").device.startswith("cuda")
        cluster.assert_no_leaks()
