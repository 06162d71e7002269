"""Norms, rotary embedding and activation against their formulas and against `transformers`."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from kvrelay_kernels.activation import gelu_tanh_mul, silu_mul
from kvrelay_kernels.norm import add_rms_norm, rms_norm
from kvrelay_kernels.rope import apply_rope


@pytest.mark.parametrize("shape", [(1, 64), (5, 97), (3, 4, 16), (0, 8)])
def test_rms_norm_equals_transformers(shape: tuple[int, ...]) -> None:
    x_ND, weight_D = torch.randn(shape), torch.rand(shape[-1]) + 0.5
    norm = LlamaRMSNorm(shape[-1], eps=1e-5)
    norm.weight.data.copy_(weight_D)
    torch.testing.assert_close(rms_norm(x_ND, weight_D, 1e-5), norm(x_ND).detach(), rtol=1e-6, atol=1e-6)


def test_rms_norm_depends_on_eps_and_weight() -> None:
    x_ND, weight_D = torch.randn(2, 8) * 1e-3, torch.rand(8) + 0.5
    assert not torch.allclose(rms_norm(x_ND, weight_D, 1e-5), rms_norm(x_ND, weight_D, 1e-6))
    assert not torch.allclose(rms_norm(x_ND, weight_D, 1e-5), rms_norm(x_ND, torch.ones(8), 1e-5))


def test_add_rms_norm_returns_the_norm_and_the_sum() -> None:
    x_ND, residual_ND, weight_D = torch.randn(3, 16), torch.randn(3, 16), torch.rand(16)
    normed_ND, total_ND = add_rms_norm(x_ND, residual_ND, weight_D, 1e-6)
    assert torch.equal(total_ND, x_ND + residual_ND)
    assert torch.equal(normed_ND, rms_norm(total_ND, weight_D, 1e-6))


@pytest.mark.parametrize(("num_tokens", "heads", "kv_heads", "dim"), [(1, 4, 2, 16), (7, 3, 3, 80), (0, 2, 1, 16)])
def test_apply_rope_equals_transformers(num_tokens: int, heads: int, kv_heads: int, dim: int) -> None:
    qkv = torch.randn(num_tokens, heads + 2 * kv_heads, dim)
    q_NHD, k_NKD = qkv[:, :heads], qkv[:, heads : heads + kv_heads]
    positions_N = torch.randperm(40)[:num_tokens]
    angles_PC = torch.outer(torch.arange(40.0), 100.0 ** -torch.linspace(0, 1, dim // 2))
    cos_sin_PD = torch.cat((angles_PC.cos(), angles_PC.sin()), dim=-1)
    angles_ND = torch.cat((angles_PC, angles_PC), dim=-1)[positions_N].unsqueeze(0)
    expected_q, expected_k = apply_rotary_pos_emb(
        q_NHD.transpose(0, 1).unsqueeze(0), k_NKD.transpose(0, 1).unsqueeze(0), angles_ND.cos(), angles_ND.sin()
    )
    q_out, k_out = apply_rope(q_NHD, k_NKD, positions_N, cos_sin_PD)
    torch.testing.assert_close(q_out, expected_q[0].transpose(0, 1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(k_out, expected_k[0].transpose(0, 1), rtol=1e-6, atol=1e-6)


def test_silu_mul() -> None:
    gate_up_N2F = torch.randn(5, 14)
    gate_NF, up_NF = gate_up_N2F[:, :7], gate_up_N2F[:, 7:]
    before = gate_up_N2F.clone()
    torch.testing.assert_close(silu_mul(gate_up_N2F), gate_NF / (1 + (-gate_NF).exp()) * up_NF)
    assert torch.equal(gate_up_N2F, before)


def test_gelu_tanh_mul_equals_transformers() -> None:
    from transformers.activations import ACT2FN

    gate_up_N2F = torch.randn(5, 14) * 3
    gate_NF, up_NF = gate_up_N2F[:, :7], gate_up_N2F[:, 7:]
    before = gate_up_N2F.clone()
    assert torch.equal(gelu_tanh_mul(gate_up_N2F), ACT2FN["gelu_pytorch_tanh"](gate_NF) * up_NF)
    assert torch.equal(gate_up_N2F, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float32_weight_is_not_rounded_to_the_activations_dtype(dtype: torch.dtype) -> None:
    x_ND, weight_D = torch.randn(4, 64).to(dtype), torch.rand(64) + 0.5
    normed_ND = rms_norm(x_ND, weight_D, 1e-6)
    assert normed_ND.dtype == dtype
    assert torch.equal(normed_ND, rms_norm(x_ND.float(), weight_D, 1e-6).to(dtype))
    assert not torch.equal(normed_ND, rms_norm(x_ND, weight_D.to(dtype), 1e-6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype(dtype: torch.dtype) -> None:
    x_NHD = torch.randn(3, 2, 16, dtype=dtype)
    q_out, k_out = apply_rope(x_NHD, x_NHD, torch.arange(3), torch.rand(3, 16))
    outputs = [q_out, k_out, rms_norm(x_NHD, torch.ones(16, dtype=dtype), 1e-6), silu_mul(x_NHD[:, 0])]
    assert {output.dtype for output in outputs} == {dtype}
