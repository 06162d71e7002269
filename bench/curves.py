"""A plot of a few curves as SVG: x on a logarithmic scale, y from 0 to 100, every point with its value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT, MARGIN = 640, 360, 56
COLORS = ("#1f5fbf", "#c2571a", "#2f8f4e", "#7a4fb5")


def draw_curves(xs: Sequence[float], curves: Mapping[str, Sequence[float]], x_name: str, y_name: str) -> str:
    """`curves` have a y for each x."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        *_axes(xs, x_name, y_name),
    ]
    for number, (name, ys) in enumerate(curves.items()):
        color = COLORS[number % len(COLORS)]
        points = [(_x(x, xs), _y(y)) for x, y in zip(xs, ys, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        shift = -8 if number % 2 == 0 else 18
        for (x, y), value in zip(points, ys, strict=True):
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>')
            parts.append(_text(x, y + shift, f"{value:.1f}", color))
        parts.append(_text(MARGIN + 60, MARGIN + 16 * number, name, color))
    return "\n".join([*parts, "</svg>\n"])


def _axes(xs: Sequence[float], x_name: str, y_name: str) -> list[str]:
    lines = []
    for y in range(0, 101, 20):
        lines.append(f'<line x1="{MARGIN}" x2="{WIDTH - MARGIN}" y1="{_y(y):.1f}" y2="{_y(y):.1f}" stroke="#ddd"/>')
        lines.append(_text(MARGIN - 18, _y(y) + 4, str(y)))
    lines += [_text(_x(x, xs), HEIGHT - MARGIN + 18, f"{x:g}") for x in xs]
    lines.append(_text(WIDTH / 2, HEIGHT - 14, x_name))
    lines.append(_text(WIDTH / 2, 24, y_name))
    return lines


def _x(x: float, xs: Sequence[float]) -> float:
    low, high = math.log(min(xs)), math.log(max(xs))
    return MARGIN + (WIDTH - 2 * MARGIN) * ((math.log(x) - low) / (high - low) if high > low else 0.5)


def _y(y: float) -> float:
    return HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * y / 100


def _text(x: float, y: float, text: str, color: str = "#333") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle" fill="{color}">{text}</text>'
