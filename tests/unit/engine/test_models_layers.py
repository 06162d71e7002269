"""The parts of the models against their definitions: RoPE tables and projections."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpoints import LINEAR_SCALING, LLAMA3_SCALING, YARN_SCALING

from kvrelay_engine.config_fields import ConfigFields
from kvrelay_engine.models.layers.linear import (
    MakeLinear,
    PackedLinear,
    PlainLinear,
    TiedLinear,
    column_major,
    linear_for_prompts,
    linear_for_tokens,
)
from kvrelay_engine.models.layers.rope import rope_table
from kvrelay_engine.rope_config import read_rope

HEAD_DIM = 64
CPU = torch.device("cpu")
# The published parameters of Llama 3.2 and of Qwen2.5, and rarer fields.
LLAMA_3_2 = {**LLAMA3_SCALING, "factor": 32.0, "original_max_position_embeddings": 8192}
QWEN_2_5 = {**YARN_SCALING, "original_max_position_embeddings": 32768}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": LINEAR_SCALING,
    "llama3": LLAMA3_SCALING,
    "llama3 published": LLAMA_3_2,
    "yarn": YARN_SCALING,
    "yarn published": QWEN_2_5,
    "yarn with attention factor": {**QWEN_2_5, "attention_factor": 0.7, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn with two multipliers": {**QWEN_2_5, "mscale": 0.7, "mscale_all_dim": 1.1, "truncate": False},
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("theta", [10_000.0, 1_000_000.0])
def test_rope_table_is_that_of_transformers_bit_by_bit(name: str, theta: float) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {**SCALINGS[name], "rope_theta": theta}
    config = LlamaConfig(
        hidden_size=HEAD_DIM * 4,
        num_attention_heads=4,
        max_position_embeddings=32768,
        rope_parameters=dict(parameters),
    )
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(2000).unsqueeze(0))
    rope = read_rope(ConfigFields("config.json", {"rope_parameters": parameters}), 32768)
    table_PD = rope_table(rope, HEAD_DIM, 2000, CPU)
    expected_PD = torch.cat([cos[0, :, : HEAD_DIM // 2], sin[0, :, : HEAD_DIM // 2]], dim=-1)
    assert table_PD.dtype == torch.float32
    assert torch.equal(table_PD, expected_PD)


@pytest.mark.parametrize("num_rows", [1, 2, 7, 8, 65])
@pytest.mark.parametrize("has_bias", [True, False])
def test_packed_projection(num_rows: int, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(96, 80, generator=generator)
    bias_O = torch.randn(96, generator=generator) if has_bias else None
    x_NI = torch.randn(num_rows, 80, generator=generator)
    expected_NO = F.linear(x_NI.double(), weight_OI.double(), None if bias_O is None else bias_O.double())
    for make_linear in (linear_for_tokens, linear_for_prompts):
        with torch.inference_mode():
            y_NO = make_linear(weight_OI.clone(), bias_O)(x_NI)
        torch.testing.assert_close(y_NO.double(), expected_NO, rtol=1e-5, atol=1e-5)


def test_only_float32_for_tokens_is_packed() -> None:
    assert isinstance(linear_for_tokens(torch.zeros(8, 8), None), PackedLinear)
    assert isinstance(linear_for_tokens(torch.zeros(8, 8, dtype=torch.bfloat16), None), PlainLinear)
    assert isinstance(linear_for_prompts(torch.zeros(8, 8), None), PlainLinear)


@pytest.mark.parametrize("num_rows", [1, 2, 8, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make_linear", [linear_for_tokens, linear_for_prompts])
def test_tied_projection_and_its_rows(num_rows: int, dtype: torch.dtype, make_linear: MakeLinear) -> None:
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(96, 80, generator=generator).to(dtype)
    x_NI = torch.randn(num_rows, 80, generator=generator).to(dtype)
    with torch.inference_mode():
        tied = TiedLinear(weight_OI, make_linear)
        y_NO = tied(x_NI)
    assert torch.equal(tied.rows_OI, weight_OI)
    is_packed = dtype is torch.float32 and make_linear is linear_for_tokens
    assert tied.copied_bytes == (96 * 80 * 4 if is_packed else 0), "what is not packed is held once"
    expected_NO = F.linear(x_NI.double(), weight_OI.double())
    error = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(y_NO.double(), expected_NO, rtol=error, atol=error)


def test_column_major_is_the_same_matrix() -> None:
    weight_VE = torch.arange(12.0).view(3, 4)
    turned_VE = column_major(weight_VE)
    assert torch.equal(turned_VE, weight_VE)
    assert turned_VE.stride() == (1, 3)
    assert torch.equal(F.embedding(torch.tensor([2, 0]), turned_VE), weight_VE[[2, 0]])
