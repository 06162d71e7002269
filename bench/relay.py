"""The relay against `transformers` on the same weights, in one run, on CPU; see bench/README.md.

scripts/bench relay                    a Llama of 100 M parameters, one thread on each side
scripts/bench relay --threads 2 --prompt-tokens 256
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tests" / "support")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import relay_cluster  # noqa: E402
from checkpoints import make_checkpoint  # noqa: E402
from cluster import Cluster  # noqa: E402
from measured import Streams, print_table, provenance, write_result  # noqa: E402
from relay_copies import probe_memcpy, probe_shm  # noqa: E402
from relay_reference import Reference  # noqa: E402

SHAPE: dict[str, Any] = {
    "architecture": "llama", "num_layers": 12, "hidden_size": 768, "num_heads": 12,
    "intermediate_size": 2048, "vocab_size": 32_000, "tie_embeddings": True,
}  # fmt: skip
CONCURRENT = 8
HANDOFF_PROMPTS = 8
HANDOFF_TOKENS = 1024


def main() -> int:
    args = parse_args()
    with tempfile.TemporaryDirectory(prefix="kvrelay-bench-") as folder:
        model_dir = make_checkpoint(Path(folder) / "model", num_kv_heads=args.kv_heads, **SHAPE)
        prompts = make_prompts(CONCURRENT, args.prompt_tokens, seed=1)
        result: dict[str, Any] = {
            "provenance": provenance(),
            "settings": {
                "threads": args.threads,
                "kv_heads": args.kv_heads,
                "prompt_tokens": args.prompt_tokens,
                "max_tokens": args.max_tokens,
            },
            "generation": compare_generation(args, model_dir, prompts),
            "handoff_gb_per_s": measure_handoff(args, model_dir),
        }
    result["idle_core_share"] = result["generation"].pop("idle_core_share")
    print_result(result)
    print(f"\nwritten to {write_result('relay', result).relative_to(ROOT)}")
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of transformers and of each engine")
    parser.add_argument("--kv-heads", type=int, default=4, help="of 12 heads; 3 to 1 as Llama 3.2 3B; 12: no GQA")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=64)
    return parser.parse_args()


def make_prompts(count: int, num_tokens: int, seed: int) -> list[list[int]]:
    """Random, so that no prompt shares a prefix with another."""
    generator = random.Random(seed)
    return [[generator.randrange(SHAPE["vocab_size"] - 4) for _ in range(num_tokens)] for _ in range(count)]


def compare_generation(args: argparse.Namespace, model_dir: Path, prompts: list[list[int]]) -> dict[str, Any]:
    reference = Reference(model_dir, args.threads)
    reference.one_after_another(prompts[:1], 4)  # warm
    rows: dict[str, Any] = {
        "transformers, 1 stream": reference.one_after_another(prompts[:3], args.max_tokens).as_row(),
        "transformers, 8 one after another": reference.one_after_another(prompts, args.max_tokens).as_row(),
        "transformers, 8 as one static batch": reference.as_one_batch(prompts, args.max_tokens).as_row(),
    }
    expected = reference.answer(prompts[0], args.max_tokens)
    fresh = [make_prompts(CONCURRENT, args.prompt_tokens, seed) for seed in range(2, 6)]
    with open_cluster(args, model_dir) as cluster:
        rows.update(asyncio.run(ask_cluster(args, cluster, prompts[0], expected, fresh)))
        rows["decode worker alone, 1 stream"] = relay_cluster.decode_alone(
            cluster, fresh[3][:3], args.max_tokens
        ).as_row()
        cluster.assert_no_leaks()
        rows["idle_core_share"] = relay_cluster.idle_shares(cluster)
    return rows


async def ask_cluster(
    args: argparse.Namespace,
    cluster: Cluster,
    prompt: list[int],
    expected: list[int],
    fresh: list[list[list[int]]],
) -> dict[str, Any]:
    async with cluster.client() as client:
        asked = await relay_cluster.ask(client, prompt, args.max_tokens)
    if list(asked.token_ids) != expected:
        raise SystemExit("kvrelay and transformers answer differently; nothing was measured")
    await relay_cluster.all_at_once(cluster, fresh[0], 4)  # warm
    rows: dict[str, Streams] = {
        "kvrelay, 1 stream": await relay_cluster.one_after_another(cluster, fresh[1][:3], args.max_tokens),
        "kvrelay, 8 streams": await relay_cluster.all_at_once(cluster, fresh[2], args.max_tokens),
    }
    return {name: streams.as_row() for name, streams in rows.items()}


def measure_handoff(args: argparse.Namespace, model_dir: Path) -> dict[str, Any]:
    shm, size_bytes = probe_shm()
    memcpy = probe_memcpy(size_bytes)
    rates: dict[str, Any] = {
        "memcpy": {"first": memcpy.first_gb_per_s, "then": memcpy.gb_per_s},
        "shm connector alone": {"first": shm.first_gb_per_s, "then": shm.gb_per_s},
    }
    prompts = make_prompts(HANDOFF_PROMPTS, HANDOFF_TOKENS, seed=9)
    for connector in ("shm", "grpc"):
        with open_cluster(args, model_dir, decode=2, placement="round_robin", connector=connector) as cluster:
            measured = asyncio.run(relay_cluster.handoff_rates(cluster, prompts))
        # The pool holds fewer prompts than are asked, so the later hand-offs land in blocks used before.
        rates[f"{connector} hand-off"] = {"first": measured[0], "then": max(measured[HANDOFF_PROMPTS // 2 :])}
    return {name: {kind: round(rate, 2) for kind, rate in pair.items()} for name, pair in rates.items()}


def open_cluster(args: argparse.Namespace, model_dir: Path, **flags: Any) -> Cluster:
    return Cluster(
        model_dir, threads_per_worker=args.threads, kv_blocks=80, max_num_seqs=16, log_level="warning", **flags
    )


def print_result(result: dict[str, Any]) -> None:
    source, settings = result["provenance"], result["settings"]
    print(
        f"Llama 12 x 768, {settings['kv_heads']} KV heads, vocabulary 32 k, float32; "
        f"{settings['prompt_tokens']} tokens in, {settings['max_tokens']} out; "
        f"{settings['threads']} thread(s) a side; {source['cpu']}, {source['cores']} cores; commit {source['commit']}\n"
    )
    rows = [
        (name, f"{row['ttft_ms']:.1f}", f"{row['inter_token_ms']:.2f}", f"{row['tokens_per_s']:.1f}")
        for name, row in result["generation"].items()
    ]
    rates = [
        (f"{name}, GB/s first / then", "", "", f"{pair['first']:.2f} / {pair['then']:.2f}")
        for name, pair in result["handoff_gb_per_s"].items()
    ]
    idle = [
        (f"idle {name}, share of a core", "", "", f"{share:.2%}") for name, share in result["idle_core_share"].items()
    ]
    print_table(("", "TTFT ms", "inter-token ms", "tokens/s"), [*rows, *rates, *idle])


if __name__ == "__main__":
    sys.exit(main())
