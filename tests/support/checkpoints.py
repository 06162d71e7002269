"""Random checkpoints in Hugging Face's format for tests, and what `transformers` answers on them.

A checkpoint's weights are drawn so that it can serve as an oracle: logits are spread widely, attention and
position matter, and every parameter that initialization leaves constant (norm weights, biases) is random too,
so that a model which forgets one of them gives another answer. The same arguments give the same checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from checkpoint_tokenizer import BEGIN_OF_TEXT, END_OF_TEXT, END_OF_TURN, special_token_id, write_tokenizer

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_SCALING = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR_SCALING = {"rope_type": "linear", "factor": 4.0}

# Arguments of `make_checkpoint`: together they cover every architecture and what can differ within one.
VARIANTS: dict[str, dict[str, Any]] = {
    "llama_plain": {"architecture": "llama", "num_heads": 4, "num_kv_heads": 4},
    "llama3_scaled": {
        "architecture": "llama",
        "num_heads": 8,
        "num_kv_heads": 2,
        "rope_scaling": LLAMA3_SCALING,
        "rope_theta": 500_000.0,
        "shards": 3,
    },
    "llama_tied_biased": {
        "architecture": "llama",
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 1,
        "tie_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_scaling": LINEAR_SCALING,
    },
    "qwen2": {"architecture": "qwen2", "num_heads": 4, "num_kv_heads": 2, "rope_theta": 1_000_000.0},
    "qwen2_tied_yarn": {
        "architecture": "qwen2",
        "num_heads": 6,
        "num_kv_heads": 2,
        "hidden_size": 96,
        "tie_embeddings": True,
        "rope_scaling": YARN_SCALING,
        "shards": 2,
    },
    "qwen3": {"architecture": "qwen3", "num_heads": 4, "num_kv_heads": 2, "head_dim": 32},
    "qwen3_tied_biased": {
        "architecture": "qwen3",
        "num_layers": 3,
        "num_heads": 5,
        "num_kv_heads": 5,
        "hidden_size": 80,
        "head_dim": 24,
        "tie_embeddings": True,
        "attention_bias": True,
        "legacy_config": True,
    },
}


def make_variant(directory: Path, name: str) -> Path:
    """Makes the checkpoint of `VARIANTS[name]` in `directory / name`."""
    return make_checkpoint(directory / name, **VARIANTS[name])


def make_checkpoint(
    directory: Path,
    architecture: str,
    *,
    seed: int = 0,
    num_layers: int = 2,
    hidden_size: int = 64,
    intermediate_size: int | None = None,
    num_heads: int = 4,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    vocab_size: int = 384,
    max_position_embeddings: int = 4096,
    tie_embeddings: bool = False,
    rope_theta: float = 10_000.0,
    rope_scaling: dict[str, Any] | None = None,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    legacy_config: bool = False,
) -> Path:
    """Writes a checkpoint with its tokenizer and returns `directory`, which is created.

    `architecture` is llama, qwen2 or qwen3. `rope_scaling` has the keys of `rope_parameters` but `rope_theta`.
    `legacy_config` writes `rope_theta`, `rope_scaling` and `torch_dtype` as transformers 4 did. With `shards` over 1
    there are at least that many safetensors files and an index.
    """
    shape: dict[str, Any] = {
        "num_hidden_layers": num_layers,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size or 2 * hidden_size + 16,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads or num_heads,
        "vocab_size": vocab_size,
        "max_position_embeddings": max_position_embeddings,
        "tie_word_embeddings": tie_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta, **(rope_scaling or {})},
        "rms_norm_eps": 1e-5,
        "bos_token_id": special_token_id(BEGIN_OF_TEXT, vocab_size),
        "eos_token_id": special_token_id(END_OF_TEXT, vocab_size),
    }
    if head_dim is not None:
        shape["head_dim"] = head_dim
    if architecture != "qwen2":  # always has QKV biases and no others
        shape["attention_bias"] = attention_bias
    if architecture == "llama":
        shape["mlp_bias"] = mlp_bias
    with quiet_transformers():
        model = _build_model(architecture, shape)
        draw_parameters(model, seed)
        total_bytes = sum(p.numel() for p in model.parameters()) * dtype.itemsize
        shard_bytes = 10**15 if shards == 1 else math.ceil(total_bytes / shards) + 1
        model.to(dtype).save_pretrained(directory, max_shard_size=shard_bytes)
    if legacy_config:
        _write_legacy_config(directory / "config.json")
    write_generation_config(directory, vocab_size)
    write_tokenizer(directory, vocab_size, adds_begin_of_text=architecture == "llama")
    return directory


def _build_model(architecture: str, shape: dict[str, Any]) -> Any:
    import transformers

    config_class, model_class = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }[architecture]
    return model_class(config_class(**shape)).eval()


def draw_parameters(model: Any, seed: int) -> None:
    """Scales each matrix by its inputs, so that no parameter is without influence on the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.uniform_(1.0, 2.5, generator=generator)  # attention that picks, not averages
            elif name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith("bias"):
                # A key bias acts only through RoPE: it must be large to matter.
                deviation = 1.5 if name.endswith("k_proj.bias") else 0.3
                parameter.normal_(0.0, deviation, generator=generator)
            elif name.endswith(("lm_head.weight", "embed_tokens.weight")):
                parameter.normal_(0.0, 3.0 / math.sqrt(parameter.shape[-1]), generator=generator)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                # Outweigh the embedding in the residual: a model with tied embeddings would repeat its input.
                parameter.normal_(0.0, 4.0 / math.sqrt(parameter.shape[-1]), generator=generator)
            else:
                parameter.normal_(0.0, 1.5 / math.sqrt(parameter.shape[-1]), generator=generator)


def _write_legacy_config(path: Path) -> None:
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config, indent=2))


def write_generation_config(directory: Path, vocab_size: int) -> None:
    generation_config = {
        "bos_token_id": special_token_id(BEGIN_OF_TEXT, vocab_size),
        "eos_token_id": [special_token_id(END_OF_TEXT, vocab_size), special_token_id(END_OF_TURN, vocab_size)],
        "pad_token_id": special_token_id(END_OF_TEXT, vocab_size),
    }
    (directory / "generation_config.json").write_text(json.dumps(generation_config, indent=2))


# ------------------------------------------------------------------------------------------------ reference


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars, and no notes about a tiny model's unusual configuration on stderr."""
    import transformers

    previous = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(previous)


def load_reference(model_dir: Path) -> Any:
    """The `transformers` model in float32 on the CPU, whose `generate` does not stop at an end-of-text token."""
    import transformers

    with quiet_transformers():
        model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return model


class ReferenceAnswer(NamedTuple):
    tokens: list[int]
    margin: float  # by which the best logit beat the second where they came closest


def reference_answers(model_dir: Path, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[ReferenceAnswer]:
    """Greedy continuations by `transformers` `generate` in float32, each of `max_new_tokens`.

    All prompts are one batch: shorter ones are padded in front, where the attention mask hides it.
    """
    model = load_reference(model_dir)
    length = max(map(len, prompts))
    ids_BN = torch.tensor([[0] * (length - len(prompt)) + list(prompt) for prompt in prompts])
    mask_BN = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with quiet_transformers(), torch.inference_mode():
        answer = model.generate(
            ids_BN,
            attention_mask=mask_BN,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    best_NB2 = torch.stack(answer.logits).topk(2).values
    margins: list[float] = (best_NB2[..., 0] - best_NB2[..., 1]).amin(0).tolist()
    tokens: list[list[int]] = answer.sequences[:, length:].tolist()
    assert all(len(row) == max_new_tokens for row in tokens)
    return list(map(ReferenceAnswer, tokens, margins))


def reference_greedy(
    model_dir: Path, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, min_margin: float = 0.0
) -> list[list[int]]:
    """The tokens of `reference_answers`.

    `min_margin`: asserts that the best logit beat the second by that much at every token, i.e. that another
    order of summation, on another machine, cannot change the answer. Change the prompt where it fails.
    """
    answers = reference_answers(model_dir, prompts, max_new_tokens)
    margin = min(answer.margin for answer in answers)
    assert margin >= min_margin, f"two tokens are within {margin:.1e} of each other: choose another prompt"
    return [answer.tokens for answer in answers]


def reference_logits(model_dir: Path, tokens: Sequence[int]) -> torch.Tensor:
    """Logits after each of `tokens`: float32 [len(tokens), vocab_size]."""
    model = load_reference(model_dir)
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([list(tokens)])).logits[0].float()
    return logits
