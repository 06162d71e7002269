"""config.json of the published models, in the forms of transformers 4 and 5, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvrelay_core.errors import ConfigError
from kvrelay_engine.loader import read_config
from kvrelay_engine.model_config import ModelConfig
from kvrelay_engine.rope_config import MropeConfig, RopeConfig

Json = dict[str, Any]

LLAMA_3_2_1B: Json = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
QWEN2_5_7B: Json = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN3_0_6B: Json = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
# The published file: flat, but for the tower.
QWEN2_5_VL_7B: Json = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 128000,
    "max_window_layers": 28,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {"depth": 32, "hidden_act": "silu", "hidden_size": 1280, "spatial_merge_size": 2},
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 152064,
}
# The published files: what has transformers' default is left out of the first.
GEMMA3_4B: Json = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model", "num_hidden_layers": 27},
}
GEMMA3_1B: Json = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "vocab_size": 262144,
}
YARN: Json = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def parse(tmp_path: Path, config: Json) -> ModelConfig:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return read_config(tmp_path)


def test_llama(tmp_path: Path) -> None:
    assert parse(tmp_path, LLAMA_3_2_1B) == ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        max_model_len=131072,
        rms_norm_eps=1e-5,
        rope=RopeConfig(
            "llama3", 500000.0, factor=32.0, original_max_len=8192, low_freq_factor=1.0, high_freq_factor=4.0
        ),
        tie_embeddings=True,
        dtype="bfloat16",
    )


def test_qwen2_has_biases_on_queries_keys_and_values(tmp_path: Path) -> None:
    config = parse(tmp_path, QWEN2_5_7B)
    assert (config.qkv_bias, config.output_bias, config.mlp_bias) == (True, False, False)
    assert (config.head_dim, config.num_kv_heads, config.rope) == (128, 4, RopeConfig("default", 1_000_000.0))


def test_qwen3_head_dim_is_its_own(tmp_path: Path) -> None:
    config = parse(tmp_path, QWEN3_0_6B)
    assert (config.head_dim, config.hidden_size, config.num_heads) == (128, 1024, 16)
    assert not config.qkv_bias


def nested(config: Json) -> Json:
    """As transformers 5 writes it: the text model's fields in an object of their own."""
    outer = ("architectures", "image_token_id", "model_type", "tie_word_embeddings", "vision_config")
    text = {name: value for name, value in config.items() if name not in (*outer, "torch_dtype")}
    text["rope_parameters"] = {**text.pop("rope_scaling"), "rope_theta": text.pop("rope_theta")}
    text["rope_parameters"].update(rope_type="default", type="default")
    text["model_type"] = "qwen2_5_vl_text"
    return {name: config[name] for name in outer} | {"dtype": config["torch_dtype"], "text_config": text}


def test_qwen2_5_vl_flat_and_nested(tmp_path: Path) -> None:
    config = parse(tmp_path, QWEN2_5_VL_7B)
    assert parse(tmp_path, nested(QWEN2_5_VL_7B)) == config
    assert config.mrope == MropeConfig((16, 24, 24), 2)
    assert (config.rope, config.head_dim, config.max_model_len) == (RopeConfig("default", 1_000_000.0), 128, 128000)
    assert (config.qkv_bias, config.output_bias, config.dtype, config.hidden_size) == (True, False, "bfloat16", 3584)


def test_qwen2_5_vl_scaled_and_tied(tmp_path: Path) -> None:
    scaling = {**YARN, "mrope_section": [16, 24, 24]}
    config = parse(tmp_path, {**QWEN2_5_VL_7B, "rope_scaling": scaling, "tie_word_embeddings": True})
    assert config.tie_embeddings
    assert (config.rope.rope_type, config.max_model_len) == ("yarn", 131072)
    assert config.mrope == MropeConfig((16, 24, 24), 2)


def test_gemma3_with_vision(tmp_path: Path) -> None:
    config = parse(tmp_path, GEMMA3_4B)
    assert (config.vocab_size, config.num_heads, config.num_kv_heads, config.head_dim) == (262208, 8, 4, 256)
    assert (config.max_model_len, config.rope) == (131072, RopeConfig("linear", 1_000_000.0, factor=8.0))
    assert config.local is not None
    assert (config.local.window, config.local.rope) == (1024, RopeConfig("default", 10_000.0))
    assert [index for index, is_local in enumerate(config.local.is_local) if not is_local] == [5, 11, 17, 23, 29]
    assert (config.attention_scale, config.embedding_scale) == (1 / 16, 2560**0.5)
    assert (config.activation, config.tie_embeddings, config.dtype) == ("gelu_pytorch_tanh", True, "bfloat16")
    assert config.media_see_ahead


def test_gemma3_text_model(tmp_path: Path) -> None:
    config = parse(tmp_path, GEMMA3_1B)
    assert (config.num_layers, config.max_model_len, config.rope) == (26, 32768, RopeConfig("default", 1_000_000.0))
    assert config.local is not None
    assert (config.local.window, sum(config.local.is_local)) == (512, 22)
    assert not config.media_see_ahead


def test_gemma3_of_transformers_5_has_a_rope_for_each_type_of_layer(tmp_path: Path) -> None:
    new = {name: value for name, value in GEMMA3_1B.items() if not name.startswith(("rope_", "sliding_window_"))}
    new["rope_parameters"] = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000},
        "full_attention": {"rope_type": "default", "rope_theta": 1000000},
    }
    new["layer_types"] = ["full_attention" if index % 6 == 5 else "sliding_attention" for index in range(26)]
    assert parse(tmp_path, new) == parse(tmp_path, GEMMA3_1B)


def test_the_maths_of_mrope_are_in_the_fingerprint_and_leave_that_of_others_alone(tmp_path: Path) -> None:
    plain = parse(tmp_path, QWEN2_5_7B)
    assert b"mrope" not in plain.maths_fingerprint_fields()
    other = {**QWEN2_5_VL_7B, "rope_scaling": {"type": "mrope", "mrope_section": [24, 24, 16]}}
    fields = [parse(tmp_path, config).maths_fingerprint_fields() for config in (QWEN2_5_VL_7B, other)]
    assert fields[0] != fields[1]


def test_the_fingerprint_of_a_plain_model_is_of_the_same_fields_as_ever(tmp_path: Path) -> None:
    fields = json.loads(parse(tmp_path, QWEN2_5_7B).maths_fingerprint_fields())
    assert list(fields) == sorted(fields)
    assert set(fields) == {
        "architecture", "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
        "head_dim", "rms_norm_eps", "rope", "tie_embeddings", "qkv_bias", "output_bias", "mlp_bias",
    }  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [{"sliding_window": 511}, {"sliding_window_pattern": 5}, {"rope_local_base_freq": 9}, {"query_pre_attn_scalar": 9}],
    ids=str,
)
def test_the_maths_of_local_layers_are_in_the_fingerprint(tmp_path: Path, change: Json) -> None:
    before = parse(tmp_path, GEMMA3_1B).maths_fingerprint_fields()
    assert parse(tmp_path, {**GEMMA3_1B, **change}).maths_fingerprint_fields() != before


@pytest.mark.parametrize("scaling", [LLAMA_3_2_1B["rope_scaling"], YARN, {"rope_type": "linear", "factor": 2.0}, None])
def test_both_forms_of_rope_parameters_are_the_same(tmp_path: Path, scaling: Json | None) -> None:
    old = {**QWEN2_5_7B, "rope_scaling": scaling, "rope_theta": 12345.0}
    new = {name: value for name, value in old.items() if name not in ("rope_scaling", "rope_theta", "torch_dtype")}
    rope_type = "default" if scaling is None else scaling.get("rope_type", "yarn")
    parameters = {name: value for name, value in (scaling or {}).items() if name != "type"}
    new["rope_parameters"] = {"rope_theta": 12345.0, "rope_type": rope_type, **parameters}
    new["dtype"] = "bfloat16"
    assert parse(tmp_path, old) == parse(tmp_path, new)


def test_scaling_beyond_the_trained_positions_lengthens_the_context(tmp_path: Path) -> None:
    assert parse(tmp_path, {**QWEN2_5_7B, "rope_scaling": YARN}).max_model_len == 131072
    linear = {"type": "linear", "factor": 2.0}
    assert parse(tmp_path, {**QWEN2_5_7B, "rope_scaling": linear}).max_model_len == 65536


def test_biases_of_llama_follow_the_flags(tmp_path: Path) -> None:
    config = parse(tmp_path, {**LLAMA_3_2_1B, "attention_bias": True, "mlp_bias": True})
    assert (config.qkv_bias, config.output_bias, config.mlp_bias) == (True, True, True)


def test_absent_fields_have_the_defaults_of_transformers(tmp_path: Path) -> None:
    minimal = ("architectures", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = parse(
        tmp_path,
        {name: LLAMA_3_2_1B[name] for name in minimal} | {"vocab_size": 100, "max_position_embeddings": 2048},
    )
    assert (config.num_kv_heads, config.head_dim, config.rms_norm_eps) == (32, 64, 1e-6)
    assert (config.rope, config.tie_embeddings, config.dtype) == (RopeConfig("default", 10_000.0), False, "float32")


@pytest.mark.parametrize(
    ("base", "change", "named"),
    [
        (LLAMA_3_2_1B, {"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM.*LlamaForCausalLM"),
        (LLAMA_3_2_1B, {"architectures": []}, "architectures none"),
        (LLAMA_3_2_1B, {"hidden_act": "gelu"}, "hidden_act 'gelu'.*'silu'"),
        (LLAMA_3_2_1B, {"hidden_size": None}, "hidden_size is missing"),
        (LLAMA_3_2_1B, {"hidden_size": "2048"}, "hidden_size must be an integer, not '2048'"),
        (LLAMA_3_2_1B, {"num_key_value_heads": 7}, "num_attention_heads 32 must be a multiple"),
        (LLAMA_3_2_1B, {"num_key_value_heads": 0}, "num_kv_heads must be at least 1"),
        (LLAMA_3_2_1B, {"num_attention_heads": 0}, "num_attention_heads must be at least 1"),
        (LLAMA_3_2_1B, {"head_dim": 63}, "head_dim must be even"),
        (LLAMA_3_2_1B, {"head_dim": None, "num_attention_heads": 24}, "not a multiple of num_attention_heads"),
        (LLAMA_3_2_1B, {"torch_dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn'.*float32, bfloat16, float16"),
        (LLAMA_3_2_1B, {"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        (LLAMA_3_2_1B, {"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
        (LLAMA_3_2_1B, {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'.*default, linear"),
        (LLAMA_3_2_1B, {"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling: RoPE type 'longrope'"),
        (LLAMA_3_2_1B, {"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        (LLAMA_3_2_1B, {"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor must be positive"),
        (LLAMA_3_2_1B, {"rope_scaling": {"rope_type": "linear", "factor": 2, "beta": 1}}, "beta not supported"),
        (LLAMA_3_2_1B, {"rope_scaling": "llama3"}, "rope_scaling must be an object"),
        (LLAMA_3_2_1B, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (QWEN2_5_7B, {"use_sliding_window": True}, "use_sliding_window true is not supported"),
        (QWEN3_0_6B, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types sliding_attention"),
        (GEMMA3_1B, {"final_logit_softcapping": 30.0}, "final_logit_softcapping is not supported"),
        (GEMMA3_1B, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is not supported"),
        (GEMMA3_1B, {"hidden_activation": "gelu"}, "hidden_activation 'gelu' is not supported"),
        (GEMMA3_1B, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (GEMMA3_1B, {"layer_types": ["full_attention"]}, "for each of 26 layers"),
        (GEMMA3_1B, {"layer_types": ["full_attention"] * 25 + ["linear"]}, "for each of 26 layers"),
        (GEMMA3_1B, {"sliding_window_pattern": 0}, "sliding_window_pattern must be at least 1"),
        (GEMMA3_1B, {"sliding_window": 0}, "sliding_window must be at least 1"),
        (GEMMA3_1B, {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be positive"),
        (QWEN2_5_VL_7B, {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24]}}, "mrope_section must be three"),
        (QWEN2_5_VL_7B, {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 8]}}, "must add up to 64"),
        (QWEN2_5_VL_7B, {"rope_scaling": {"type": "mrope", "mrope_section": "16"}}, "must be a list of integers"),
        (QWEN2_5_VL_7B, {"vision_config": {"spatial_merge_size": 0}}, "spatial_merge_size must be at least 1"),
        (QWEN2_5_VL_7B, {"use_sliding_window": True}, "use_sliding_window true is not supported"),
        (QWEN2_5_7B, {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, "RoPE type 'mrope'"),
        (QWEN3_0_6B, {"layer_types": "full_attention"}, "layer_types must be a list of strings"),
    ],
)
def test_what_cannot_work_is_named(tmp_path: Path, base: Json, change: Json, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse(tmp_path, {**base, **change})


def test_llama3_frequency_factors_must_be_in_order(tmp_path: Path) -> None:
    scaling = {**LLAMA_3_2_1B["rope_scaling"], "high_freq_factor": 1.0}
    with pytest.raises(ConfigError, match=r"high_freq_factor 1\.0 must be above low_freq_factor 1\.0"):
        parse(tmp_path, {**LLAMA_3_2_1B, "rope_scaling": scaling})


@pytest.mark.parametrize(("content", "named"), [("{", "not valid JSON"), ("[]", "must hold a JSON object")])
def test_malformed_file(tmp_path: Path, content: str, named: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=named):
        read_config(tmp_path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is this a model directory"):
        read_config(tmp_path)
