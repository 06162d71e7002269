"""Images through encoder, prefill and decode in separate processes: the answers are those of `transformers`.

Warm and cold caches, a picture in another place, and an encoder that was ended and started again in between.
"""

from __future__ import annotations

import random
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_tokenizer import media_token_id
from checkpoints import quiet_transformers
from cluster import Cluster
from lone_worker import serve
from PIL import Image
from vision_checkpoints import QWEN_TOKENS, VOCAB_SIZE, as_bytes, draw_picture, make_qwen2_5_vl

from kvrelay_cli.ports import choose_ports
from kvrelay_client import AsyncClient

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

START, PAD, _, END = (media_token_id(token, QWEN_TOKENS, VOCAB_SIZE) for token in QWEN_TOKENS)
NUM_TOKENS = 8
MIN_MARGIN = 1e-3  # between the best two logits of every token: far above what rounding does
PICTURES = [as_bytes(draw_picture(*size, seed=seed)) for seed, size in enumerate([(40, 24), (64, 64), (33, 50)])]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen2_5_vl(tmp_path_factory.mktemp("encoder") / "qwen2_5_vl")


class Reference:
    """`transformers` on the whole."""

    def __init__(self, model_dir: Path) -> None:
        import transformers
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        with quiet_transformers():
            self._model: Any = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
                model_dir, dtype=torch.float32
            ).eval()
        self._processor: Any = Qwen2VLImageProcessorPil.from_pretrained(model_dir)

    def answer(self, token_ids: list[int], pictures: list[bytes]) -> tuple[list[int], float]:
        """The greedy answer, and the least margin of its tokens. One placeholder stands for a picture."""
        images = [Image.open(BytesIO(data)) for data in pictures]
        inputs = dict(self._processor(images, return_tensors="pt"))
        sizes = (inputs["image_grid_thw"].prod(-1) // 4).tolist()
        ids: list[int] = []
        for token in token_ids:
            ids += [PAD] * sizes.pop(0) if token == PAD else [token]
        input_ids = torch.tensor([ids])
        out = self._model.generate(
            input_ids=input_ids, attention_mask=torch.ones_like(input_ids), do_sample=False,
            max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS, eos_token_id=None, pad_token_id=0,
            mm_token_type_ids=(input_ids == PAD).int(), return_dict_in_generate=True, output_logits=True, **inputs,
        )  # fmt: skip
        best = torch.stack(out.logits)[:, 0].topk(2).values
        return out.sequences[0, len(ids) :].tolist(), float((best[:, 0] - best[:, 1]).min())


def prompt_of(generator: random.Random, *parts: int | None) -> list[int]:
    """So many text tokens, or a picture."""
    tokens: list[int] = []
    for part in parts:
        tokens += [START, PAD, END] if part is None else [generator.randrange(250) for _ in range(part)]
    return tokens


def decisive(reference: Reference, pictures: list[bytes], *parts: int | None) -> tuple[list[int], list[int]]:
    """A prompt whose answer rounding cannot change, and the answer."""
    for seed in range(50):
        prompt = prompt_of(random.Random(seed), *parts)
        answer, margin = reference.answer(prompt, pictures)
        if margin >= MIN_MARGIN:
            return prompt, answer
    raise AssertionError("no decisive prompt found")


async def ask(client: AsyncClient, prompt: list[int], pictures: list[bytes]) -> list[int]:
    answer = await client.complete(
        token_ids=prompt, media=pictures, max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True, timeout_s=60
    )
    return list(answer.token_ids)


@pytest.mark.parametrize("connector", ["shm", "grpc"])
async def test_encoder_exact_over_three_processes(model_dir: Path, connector: str) -> None:
    reference = Reference(model_dir)
    one = decisive(reference, PICTURES[:1], 7, None, 9)
    three = decisive(reference, PICTURES, None, 30, None, None, 5)
    other = reference.answer(one[0], PICTURES[1:2])[0]
    assert other != one[1], "the picture matters"
    flags = {"model": model_dir, "connector": connector}
    text = {**flags, "block_tokens": 16, "max_num_seqs": 8, "max_batched_tokens": 24}
    with serve("encoder", **flags) as encoder, serve("prefill", peers=encoder, **text) as prefill:
        with (
            serve("decode", peers=prefill, **text) as decode,
            serve("router", model=model_dir, encoder=encoder, prefill=prefill, decode=decode) as target,
        ):
            async with AsyncClient(target) as client:
                for _ in range(2):  # cold, then out of every cache
                    assert await ask(client, one[0], PICTURES[:1]) == one[1]
                    assert await ask(client, three[0], PICTURES) == three[1]
                assert await ask(client, one[0], PICTURES[1:2]) == other


async def test_encoder_exact_after_an_encoder_was_killed(model_dir: Path) -> None:
    """`kvrelay up` starts it again; meanwhile requests wait for it."""
    reference = Reference(model_dir)
    first = decisive(reference, PICTURES[:1], 7, None, 9)
    second = decisive(reference, PICTURES[:2], 4, None, 11, None, 3)
    with Cluster(model_dir, encoder=1, block_tokens=16, max_num_seqs=8) as cluster:
        async with AsyncClient(cluster.target) as client:
            assert await ask(client, first[0], PICTURES[:1]) == first[1]
            cluster.wait_restarted("encoder", 0, cluster.kill("encoder"))
            assert await ask(client, second[0], PICTURES[:2]) == second[1]
            assert await ask(client, first[0], PICTURES[:1]) == first[1]
        cluster.assert_no_leaks()
        assert cluster.load_of("encoder").leases == 0


@pytest.mark.full
async def test_encoder_exact_after_an_encoder_has_restarted(model_dir: Path) -> None:
    """Tickets and links are of one start: those of the old one are not used, nor missed."""
    reference = Reference(model_dir)
    first = decisive(reference, PICTURES[:1], 7, None, 9)
    second = decisive(reference, PICTURES[:2], 4, None, 11, None, 3)
    (port,) = choose_ports("127.0.0.1", 1)
    encoder = {"model": model_dir, "grpc_port": port}
    text = {"model": model_dir, "block_tokens": 16, "max_num_seqs": 8}
    with ExitStack() as started:
        peers = started.enter_context(serve("encoder", **encoder))
        with (
            serve("prefill", peers=peers, **text) as prefill,
            serve("decode", peers=prefill, **text) as decode,
            serve("router", model=model_dir, encoder=peers, prefill=prefill, decode=decode) as target,
        ):
            async with AsyncClient(target) as client:
                assert await ask(client, first[0], PICTURES[:1]) == first[1]
                started.pop_all().close()
                started.enter_context(serve("encoder", **encoder))
                assert await ask(client, second[0], PICTURES[:2]) == second[1]
                assert await ask(client, first[0], PICTURES[:1]) == first[1]
