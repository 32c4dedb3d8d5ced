"""Plots of a report as inline SVG, made here: a report is one file that loads nothing."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from common.errors import FedwardError

WIDTH, HEIGHT = 520, 400
LEFT, BOTTOM, TOP, RIGHT = 62, 46, 14, 14
COLOURS = ("#0b5fa5", "#b5461b", "#2c7a3f", "#7a3d9a", "#8a6d00", "#007a87")  # 4.5 : 1 on white, at least
MOST_POINTS = 300  # of a line
FONT = 'font-family="system-ui, sans-serif" font-size="12" fill="#222"'

Line = Sequence[tuple[float, float]]


def log_log(
    curves: Mapping[str, Line],
    ceilings: Mapping[str, Line],
    *,
    title: str,
    least: float = 1e-3,
    axes: tuple[str, str] = ("false-positive rate", "true-positive rate"),
) -> str:
    """A ROC plot with logarithmic axes from `least` to 1, as an SVG element.

    Args:
        curves: name → points (x, y), drawn solid; `ceilings` dashed, likewise. Both with x rising.
        title: what a screen reader says.

    Raises:
        FedwardError: if `least` isn't between 0 and 1, or there are more lines than can be told apart.
    """
    if not 0 < least < 1:
        raise FedwardError(f"a logarithmic axis from {least:g}", remedy="between 0 and 1")
    if max(len(curves), len(ceilings)) > len(COLOURS):
        raise FedwardError(f"more than {len(COLOURS)} lines in a plot", remedy="draw several plots")
    parts = [_grid(least, axes), _path([(least, least), (1.0, 1.0)], least, "#777", "1 3")]
    legend: list[tuple[str, str, str]] = []
    for given, dashes in ((ceilings, "6 4"), (curves, "")):
        for colour, (name, points) in zip(COLOURS, given.items(), strict=False):
            parts.append(_path(points, least, colour, dashes))
            legend.append((name, colour, dashes))
    legend.append(("guessing", "#777", "1 3"))
    return _figure(WIDTH, HEIGHT, title, [*parts, _legend(legend)])


def pictures(
    rows: Mapping[str, np.ndarray], *, title: str, columns: Sequence[str] = (), scale: int = 8
) -> str:
    """Rows of grey pictures, as an SVG element.

    Args:
        rows: label (it may be empty) → [pictures, height, width], 0 black to 1 white; what is outside is cut,
            NaN is black.
        columns: a label for each picture of a row.
        title: what a screen reader says.
        scale: screen pixels of one picture's pixel.
    """
    if not rows:
        raise FedwardError("no pictures to show", remedy="give one row at least")
    most = max(len(row) for row in rows.values())
    high, wide = (max(row.shape[axis] for row in rows.values()) * scale for axis in (1, 2))
    left, top, gap = 210 if any(rows) else 0, 24 if columns else 6, 8
    parts = [
        f'<text x="{left + (wide + gap) * i + wide / 2:g}" y="16" text-anchor="middle" {FONT}>'
        f"{escape(c)}</text>"
        for i, c in enumerate(columns[:most])
    ]
    for number, (label, row) in enumerate(rows.items()):
        y = top + number * (high + gap)
        parts.append(f'<text x="4" y="{y + high / 2 + 4:g}" {FONT}>{escape(label)}</text>')
        for i, picture in enumerate(row):
            source = base64.b64encode(png(picture)).decode()
            parts.append(
                f'<image x="{left + (wide + gap) * i}" y="{y}" width="{picture.shape[1] * scale}" '
                f'height="{picture.shape[0] * scale}" style="image-rendering:pixelated" '
                f'href="data:image/png;base64,{source}"/>'
            )
    return _figure(left + (wide + gap) * most, top + (high + gap) * len(rows), title, parts)


def png(picture: np.ndarray) -> bytes:
    """A grey picture of 8 bits as a PNG file (ISO/IEC 15948): signature, IHDR, IDAT, IEND.

    Args:
        picture: [height, width], 0 black to 1 white; what is outside is cut, NaN is black.
    """
    grey = np.nan_to_num(np.asarray(picture, dtype=np.float64), nan=0.0).clip(0.0, 1.0)
    values = np.rint(255 * grey).astype(np.uint8)
    height, width = values.shape
    lines = np.hstack([np.zeros((height, 1), np.uint8), values])  # each line begins with filter 0
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, body) for kind, body in chunks)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _figure(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img"><title>{escape(title)}</title>{"".join(parts)}</svg>'
    )


def _place(x: float, y: float, least: float) -> tuple[float, float]:
    """Of a point on the page; what is below the axes lies on them."""
    across, up = (1 - math.log(max(v, least)) / math.log(least) for v in (min(1.0, x), min(1.0, y)))
    return (
        LEFT + across * (WIDTH - LEFT - RIGHT),
        HEIGHT - BOTTOM - up * (HEIGHT - BOTTOM - TOP),
    )


def _path(points: Line, least: float, colour: str, dashes: str) -> str:
    """A line through points; those left of the axis but the last are left out."""
    kept = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    before = sum(x <= least for x, _ in kept)
    kept = kept[max(0, before - 1) :]
    if len(kept) > MOST_POINTS:
        chosen = np.unique(np.linspace(0, len(kept) - 1, MOST_POINTS).astype(int))
        kept = [kept[i] for i in chosen]
    placed = (_place(x, y, least) for x, y in kept)
    told = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
    style = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<polyline points="{told}" fill="none" stroke="{colour}" stroke-width="1.6"{style}/>'


def _grid(least: float, axes: tuple[str, str]) -> str:
    """Axes with a line for each power of ten."""
    parts = []
    for power in range(math.ceil(math.log10(least) - 1e-9), 1):
        value = 10.0**power
        x, y = _place(value, value, least)
        parts.append(
            f'<path d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>'
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle" {FONT}>{value:g}</text>'
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end" {FONT}>{value:g}</text>'
        )
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}" fill="none" stroke="#222"/>'
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2:g}" y="{HEIGHT - 8}" text-anchor="middle" {FONT}>'
        f"{escape(axes[0])}</text>"
        f'<text x="14" y="{middle:g}" text-anchor="middle" transform="rotate(-90 14 {middle:g})" {FONT}>'
        f"{escape(axes[1])}</text>"
    )
    return "".join(parts)


def _legend(entries: Sequence[tuple[str, str, str]]) -> str:
    """At the lower right, where a ROC curve seldom is."""
    parts = []
    for number, (name, colour, dashes) in enumerate(reversed(entries)):
        y = HEIGHT - BOTTOM - 12 - 16 * number
        style = f' stroke-dasharray="{dashes}"' if dashes else ""
        parts.append(
            f'<path d="M{WIDTH - 44} {y}H{WIDTH - 20}" stroke="{colour}" stroke-width="2"{style}/>'
            f'<text x="{WIDTH - 50}" y="{y + 4}" text-anchor="end" {FONT}>{escape(name)}</text>'
        )
    return "".join(parts)
