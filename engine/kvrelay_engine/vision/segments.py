"""Attention within segments of a packed batch: a row sees the rows of its own segment and no others.

Segments of equal length are computed together, so that nothing is padded or masked. It knows nothing of pictures.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Segments:
    """`groups` are (number of segments, their length); rows follow each other in this order after `order_N`."""

    groups: tuple[tuple[int, int], ...]
    order_N: Tensor | None = None  # int64; None: the rows lie in that order

    @classmethod
    def of(cls, ids_N: Tensor) -> Segments:
        """Rows with the same id, an integer from 0, are a segment; their order within it is kept."""
        counts = torch.bincount(ids_N)
        order_N = torch.argsort(counts[ids_N] * len(counts) + ids_N, stable=True)
        lengths, numbers = torch.unique(counts[counts > 0], return_counts=True)
        groups = tuple(zip(numbers.tolist(), lengths.tolist(), strict=True))
        is_in_order = bool((order_N[1:] > order_N[:-1]).all())
        return cls(groups, None if is_in_order else order_N)

    def of_larger_rows(self, size: int) -> Segments:
        """The same segments, where each row has become `size` rows."""
        groups = tuple((number, length * size) for number, length in self.groups)
        if self.order_N is None:
            return Segments(groups)
        return Segments(groups, (self.order_N.unsqueeze(1) * size + torch.arange(size)).flatten())

    def to(self, device: torch.device) -> Segments:
        return self if self.order_N is None else Segments(self.groups, self.order_N.to(device))

    def attend(self, q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor) -> Tensor:
        """[N, H, D], with the usual scale of D^-0.5."""
        if self.order_N is None:
            return self._attend_in_order(q_NHD, k_NHD, v_NHD)
        order_N = self.order_N
        out_NHD = self._attend_in_order(*(x_NHD.index_select(0, order_N) for x_NHD in (q_NHD, k_NHD, v_NHD)))
        return torch.empty_like(out_NHD).index_copy_(0, order_N, out_NHD)

    def _attend_in_order(self, *qkv_NHD: Tensor) -> Tensor:
        sizes = [number * length for number, length in self.groups]
        parts = [
            _attend_group(number, *part)
            for (number, _), part in zip(
                self.groups, zip(*(x_NHD.split_with_sizes(sizes) for x_NHD in qkv_NHD), strict=True), strict=True
            )
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend_group(num_segments: int, *qkv_NHD: Tensor) -> Tensor:
    q, k, v = (x_NHD.view(num_segments, -1, *x_NHD.shape[1:]).transpose(1, 2) for x_NHD in qkv_NHD)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)
