"""Qwen2.5-VL-7B's tower with random weights on one GPU, beside its matrix products alone and its peak; see README.

scripts/bench encoder_device                     pictures of 1,008 x 1,008 and 448 x 448 pixels, bfloat16
scripts/bench encoder_device --sides 448 --batches 1,16,64

The pictures are on the CPU as the encoder prepares them, so the way to the GPU is part of the time. Not part of it are
decoding, resizing, and the hand-off of what comes out. Work is what the model needs: products with weights, and
attention of every patch to those it sees; nothing that is added to fill a tile.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bench")]

import torch  # noqa: E402
from measured import print_table, provenance, write_result  # noqa: E402
from torch import Tensor  # noqa: E402

from kvrelay_engine.vision.image_input import ImageInput  # noqa: E402
from kvrelay_engine.vision.qwen2_5_vl.config import QwenVisionConfig  # noqa: E402
from kvrelay_engine.vision.qwen2_5_vl.tower import QwenVisionTower  # noqa: E402
from kvrelay_engine.vision.qwen2_5_vl.weights import read_weights  # noqa: E402
from kvrelay_engine.weight_reader import WeightReader  # noqa: E402

CONFIG = QwenVisionConfig(
    num_layers=32, hidden_size=1280, intermediate_size=3420, num_heads=16, output_size=3584, patch_size=14,
    temporal_patch_size=2, merge_size=2, window_size=112, full_attention_layers=(7, 15, 23, 31), rope_theta=10_000.0,
)  # fmt: skip
PEAK_SIDE = 8192  # of the square product that is taken for the GPU's peak
ADDED_UNITS = 4  # to a whole multiple of 16, which GPUs multiply several times as fast; see the tower's weights
PATCHES_PER_STEP = 65_536  # that an encoder on a GPU takes
WARM_UPS, TIMED = 2, 6
Product = tuple[int, int, int]  # rows, inner size, columns


def main() -> int:
    args = parse_args()
    if not torch.cuda.is_available():
        print("bench/encoder_device.py needs an NVIDIA GPU; nothing was measured", file=sys.stderr)
        return 1
    device = torch.device("cuda")
    tower = make_tower(device)
    peak_s = median_s(products_of([(PEAK_SIDE, PEAK_SIDE, PEAK_SIDE)], device))
    peak_flops = 2 * PEAK_SIDE**3 / peak_s
    rows = [
        {"side": side, "pictures": count, **measure_batch(tower, side, count, device, peak_flops)}
        for side in args.sides
        for count in args.batches
        if count * patches_of(side) <= PATCHES_PER_STEP
    ]
    result = {
        "provenance": {**provenance(), "gpus": torch.cuda.get_device_name()},
        "settings": {"dtype": "bfloat16"},
        "gemm_peak_tflops": peak_flops / 1e12,
        "batches": rows,
    }
    print_result(result)
    print(f"\nwritten to {write_result('encoder_device', result).relative_to(ROOT)}")
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=_numbers, default=[1008, 448], help="of pictures in pixels, multiples of 28")
    parser.add_argument("--batches", type=_numbers, default=[1, 4, 12, 60], help="pictures at a time")
    return parser.parse_args()


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


# ------------------------------------------------------------------------------------------------------- the tower


class RandomReader:
    """Stands in for a checkpoint: draws each tensor that is asked for, scaled by its inputs."""

    def __init__(self, device: torch.device) -> None:
        self._generator = torch.Generator(device).manual_seed(0)

    def has(self, name: str) -> bool:
        return True

    def read(self, name: str, shape: Sequence[int]) -> Tensor:
        if len(shape) == 1:
            return torch.ones(*shape, device=self._generator.device, dtype=torch.bfloat16)
        drawn = torch.randn(*shape, device=self._generator.device, generator=self._generator)
        return (drawn / math.sqrt(drawn[0].numel())).to(torch.bfloat16)

    def read_fused(self, names: Sequence[str], rows: Sequence[int], columns: int | None = None) -> Tensor:
        return self.read(names[0], (sum(rows),) if columns is None else (sum(rows), columns))


def make_tower(device: torch.device) -> QwenVisionTower:
    return QwenVisionTower(CONFIG, read_weights(cast(WeightReader, RandomReader(device)), CONFIG))


def draw_images(side: int, count: int) -> list[ImageInput]:
    patches, height = patches_of(side), side // CONFIG.patch_size
    pixels = torch.randn(patches, CONFIG.patch_values, generator=torch.Generator().manual_seed(1))
    tokens = patches // CONFIG.merge_size**2
    return [ImageInput(pixels, (1, height, height), patches, tokens) for _ in range(count)]


def patches_of(side: int) -> int:
    return (side // CONFIG.patch_size) ** 2


def products(num_patches: int, inner_units: int = CONFIG.intermediate_size) -> Iterator[Product]:
    """Every matrix product with weights; attention is not among them."""
    size, inner = CONFIG.hidden_size, CONFIG.hidden_size * CONFIG.merge_size**2
    yield num_patches, CONFIG.patch_values, size
    for _ in range(CONFIG.num_layers):
        yield num_patches, size, 3 * size
        yield num_patches, size, size
        yield num_patches, size, 2 * inner_units
        yield num_patches, inner_units, size
    merged = num_patches // CONFIG.merge_size**2
    yield merged, inner, inner
    yield merged, inner, CONFIG.output_size


# ------------------------------------------------------------------------------------------------------- the clock


def measure_batch(
    tower: QwenVisionTower, side: int, count: int, device: torch.device, peak_flops: float
) -> dict[str, float]:
    images = [image.staged_for(device, torch.bfloat16) for image in draw_images(side, count)]
    shapes = list(products(count * patches_of(side)))
    flops = sum(2 * rows * inner * columns for rows, inner, columns in shapes) + count * attention_flops(side)
    computed = list(products(count * patches_of(side), CONFIG.intermediate_size + ADDED_UNITS))
    whole_s, alone_s = median_s(lambda: tower.encode(images)), median_s(products_of(computed, device))
    return {
        "pictures_per_s": count / whole_s,
        "ms": 1e3 * whole_s,
        "posting_ms": 1e3 * posting_s(lambda: tower.encode(images)),
        "products_alone_ms": 1e3 * alone_s,
        "tflops": flops / whole_s / 1e12,
        "share_of_peak": flops / whole_s / peak_flops,
    }


def attention_flops(side: int) -> int:
    """Of one picture: each patch with those of its window, or of the picture, whose sides may end within a window."""
    per_side, window = side // CONFIG.patch_size, CONFIG.window_size // CONFIG.patch_size
    spans = [min(window, per_side - first) for first in range(0, per_side, window)]
    in_windows = sum((rows * columns) ** 2 for rows in spans for columns in spans)
    full = len(CONFIG.full_attention_layers)
    return 4 * CONFIG.hidden_size * ((CONFIG.num_layers - full) * in_windows + full * patches_of(side) ** 2)


def products_of(shapes: Sequence[Product], device: torch.device) -> Callable[[], None]:
    """One after another on random data, each shape's operands drawn once."""

    def draw(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, device=device, dtype=torch.bfloat16)

    # Weights lie by output, as in a checkpoint.
    operands = {shape: (draw(shape[0], shape[1]), draw(shape[2], shape[1]).t()) for shape in set(shapes)}

    def run() -> None:
        for shape in shapes:
            torch.matmul(*operands[shape])

    return run


def median_s(work: Callable[[], object]) -> float:
    """By the GPU's clock, from before the work is posted until it is through."""
    times_s: list[float] = []
    for _ in range(WARM_UPS + TIMED):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        before.record()
        work()
        after.record()
        after.synchronize()
        times_s.append(before.elapsed_time(after) / 1e3)
    return statistics.median(times_s[WARM_UPS:])


def posting_s(work: Callable[[], object]) -> float:
    """That the CPU is busy with it."""
    times_s: list[float] = []
    for _ in range(TIMED):
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        work()
        times_s.append(time.perf_counter() - began_s)
    return statistics.median(times_s)


def print_result(result: dict[str, Any]) -> None:
    source = result["provenance"]
    print(
        f"Qwen2.5-VL-7B's tower, random, {result['settings']['dtype']}; {source['gpus']}, "
        f"{result['gemm_peak_tflops']:.0f} TFLOP/s in a square product; commit {source['commit']}\n"
    )
    rows = [
        (
            f"{row['pictures']} of {row['side']} x {row['side']}",
            f"{row['pictures_per_s']:.1f}",
            f"{row['ms']:.2f}",
            f"{row['posting_ms']:.2f}",
            f"{row['products_alone_ms']:.2f}",
            f"{row['tflops']:.0f}",
            f"{row['share_of_peak']:.0%}",
        )
        for row in result["batches"]
    ]
    header = ("pictures", "pictures/s", "ms", "CPU posts for ms", "products alone ms", "TFLOP/s", "of peak")
    print_table(header, rows)


if __name__ == "__main__":
    sys.exit(main())
