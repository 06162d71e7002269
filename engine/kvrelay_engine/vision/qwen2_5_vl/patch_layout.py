"""Where the patches of a batch lie and which of them attend to each other.

Patches come picture by picture, the merge_size^2 patches of one embedding together. The tower takes them window by
window, windows of equal size together: most layers then attend within slices of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvrelay_engine.vision.qwen2_5_vl.config import QwenVisionConfig
from kvrelay_engine.vision.segments import Segments

Grid = tuple[int, int, int]  # frames, rows, columns, in patches


@dataclass(frozen=True, slots=True)
class PatchLayout:
    order_M: Tensor  # int64: the embedding at each place of the tower's order; its patches move along
    windows: Segments  # of patches in the tower's order, as are the others
    frames: Segments
    coordinates_N2: Tensor  # int64: row and column within the picture


def lay_out(grids: Sequence[Grid], config: QwenVisionConfig) -> PatchLayout:
    """Raises nothing: the processor has made every grid a multiple of the merge size."""
    unit = config.merge_size**2
    order_M, windows = _by_window(_window_ids(grids, config))
    frames = Segments.of(_frame_ids(grids, unit)[order_M])
    coordinates_MU2 = {grid: _coordinates(grid, config.merge_size) for grid in set(grids)}
    return PatchLayout(
        order_M=order_M,
        windows=Segments(windows.groups).of_larger_rows(unit),
        frames=frames.of_larger_rows(unit),
        coordinates_N2=torch.cat([coordinates_MU2[grid] for grid in grids])[order_M].flatten(0, 1),
    )


def _by_window(ids_M: Tensor) -> tuple[Tensor, Segments]:
    segments = Segments.of(ids_M)
    order_M = segments.order_N if segments.order_N is not None else torch.arange(len(ids_M))
    return order_M, segments


def _window_ids(grids: Sequence[Grid], config: QwenVisionConfig) -> Tensor:
    """int64 [M]: windows never reach over a frame's edge; those at the right and the bottom may be smaller."""
    size, ids, first = config.merged_window_size, [], 0
    for frames, rows, columns in _merged(grids, config.merge_size):
        windows_down, windows_across = -(-rows // size), -(-columns // size)
        row_R1 = torch.arange(rows).unsqueeze(1) // size
        column_C = torch.arange(columns) // size
        frame_F11 = torch.arange(frames).view(-1, 1, 1)
        ids.append(first + ((frame_F11 * windows_down + row_R1) * windows_across + column_C).flatten())
        first += frames * windows_down * windows_across
    return torch.cat(ids)


def _frame_ids(grids: Sequence[Grid], unit: int) -> Tensor:
    """int64 [M]."""
    sizes = [rows * columns // unit for frames, rows, columns in grids for _ in range(frames)]
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))


def _coordinates(grid: Grid, merge_size: int) -> Tensor:
    """int64 [M of the picture, merge_size^2, 2]."""
    frames, rows, columns = grid
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    blocks = places.view(rows // merge_size, merge_size, columns // merge_size, merge_size, 2).transpose(1, 2)
    return blocks.reshape(-1, merge_size**2, 2).repeat(frames, 1, 1)


def _merged(grids: Sequence[Grid], merge_size: int) -> list[Grid]:
    return [(frames, rows // merge_size, columns // merge_size) for frames, rows, columns in grids]
