"""What codecs of the tiers make of KV: how small, how fast, how far off.

scripts/bench tier_codecs
scripts/bench tier_codecs --layers 4 --head-dim 128 --tokens 4096

KV of a random Llama of `transformers` over random tokens, in the parts that tiers keep, on one thread; beside it a copy
of the same bytes. Random weights give KV without the outliers of trained ones: ratios of a real model differ, and its
error under fp8 is larger beside the scale that an outlier sets. Errors are relative to the largest value of a vector.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from msgspec import Struct
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bench")]

from measured import print_table, provenance, write_result  # noqa: E402

from kvrelay_transfer.tiers.codec import Codec  # noqa: E402
from kvrelay_transfer.tiers.codec_fp8 import Fp8Codec  # noqa: E402
from kvrelay_transfer.tiers.codec_zstd import ZstdCodec  # noqa: E402

CHUNK_TOKENS = 256
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class CodecRow(Struct, frozen=True):
    dtype: str
    codec: str
    ratio: float  # of the raw size
    encode_gb_per_s: float  # raw bytes
    decode_gb_per_s: float
    copy_gb_per_s: float  # of the same bytes, beside it
    mean_error: float  # of the largest value of a vector
    max_error: float


def make_kv(num_layers: int, num_kv_heads: int, head_dim: int, num_tokens: int) -> torch.Tensor:
    """[chunks, layers, 2, kv_heads, CHUNK_TOKENS, head_dim], fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=2 * num_kv_heads * head_dim, intermediate_size=4 * num_kv_heads * head_dim,
        num_hidden_layers=num_layers, num_attention_heads=2 * num_kv_heads, num_key_value_heads=num_kv_heads,
        head_dim=head_dim, max_position_embeddings=num_tokens,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.inference_mode():
        cache = model(torch.randint(0, 4096, (1, num_tokens)), use_cache=True).past_key_values
    layers = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
    whole = torch.stack(layers)  # [layers, 2, heads, tokens, head_dim]
    num_chunks = num_tokens // CHUNK_TOKENS
    return whole.view(num_layers, 2, num_kv_heads, num_chunks, CHUNK_TOKENS, head_dim).movedim(3, 0)


def measure(dtype: str, name: str, codec: Codec, kv: torch.Tensor) -> CodecRow:
    parts = [memoryview(chunk.to(DTYPES[dtype]).contiguous().view(torch.uint8).numpy().reshape(-1)) for chunk in kv]
    encoded = [memoryview(bytearray(len(part))) for part in parts]
    decoded = [memoryview(bytearray(len(part))) for part in parts]
    lengths: list[int] = []

    def encode() -> None:
        lengths[:] = [codec.encode(part, into) or len(part) for part, into in zip(parts, encoded, strict=True)]

    def decode() -> None:
        for body, length, into in zip(encoded, lengths, decoded, strict=True):
            if length == len(into):
                into[:] = body
            else:
                assert codec.decode(body[:length], into)

    def copy() -> None:
        for part, into in zip(parts, decoded, strict=True):
            into[:] = part

    num_bytes = sum(map(len, parts))
    speeds = [num_bytes / best_of(work) / 1e9 for work in (copy, encode, decode)]
    if all(length == len(part) for length, part in zip(lengths, parts, strict=True)):
        name += " (kept raw)"
    errors = np.concatenate(
        [_errors(part, into, dtype, kv.shape[-1]) for part, into in zip(parts, decoded, strict=True)]
    )
    return CodecRow(
        dtype,
        name,
        sum(lengths) / num_bytes,
        speeds[1],
        speeds[2],
        speeds[0],
        float(errors.mean()),
        float(errors.max()),
    )


def _errors(part: memoryview, decoded: memoryview, dtype: str, head_dim: int) -> NDArray[np.float64]:
    raw, got = (torch.frombuffer(data, dtype=DTYPES[dtype]).double().view(-1, head_dim) for data in (part, decoded))
    return ((got - raw).abs() / raw.abs().amax(1, keepdim=True)).flatten().numpy()


def best_of(work: Callable[[], None], repeats: int = 3) -> float:
    times_s = []
    for _ in range(repeats):
        started_s = time.perf_counter()
        work()
        times_s.append(time.perf_counter() - started_s)
    return min(times_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=2048, help=f"a multiple of {CHUNK_TOKENS}")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kv = make_kv(args.layers, args.kv_heads, args.head_dim, args.tokens)
    rows = []
    for dtype, torch_dtype in DTYPES.items():
        codecs: dict[str, Codec] = {
            "zstd": ZstdCodec(torch_dtype.itemsize), "fp8": Fp8Codec(dtype, args.head_dim)
        }  # fmt: skip
        rows += [measure(dtype, name, codec, kv) for name, codec in codecs.items()]
    header = ["KV", "codec", "size", "encode GB/s", "decode GB/s", "copy GB/s", "mean error", "largest error"]
    print_table(header, [as_cells(row) for row in rows])
    shape = {"layers": args.layers, "kv_heads": args.kv_heads, "head_dim": args.head_dim, "tokens": args.tokens}
    print(write_result("tier_codecs", {"provenance": provenance(), "kv": shape, "rows": rows_as_dicts(rows)}))


def as_cells(row: CodecRow) -> list[str]:
    speeds = (row.encode_gb_per_s, row.decode_gb_per_s, row.copy_gb_per_s)
    errors = (row.mean_error, row.max_error)
    texts = [f"{row.ratio:.1%}", *(f"{speed:.2f}" for speed in speeds), *(f"{error:.1e}" for error in errors)]
    return [row.dtype, row.codec, *texts]


def rows_as_dicts(rows: list[CodecRow]) -> list[dict[str, object]]:
    return [{name: getattr(row, name) for name in row.__struct_fields__} for row in rows]


if __name__ == "__main__":
    main()
