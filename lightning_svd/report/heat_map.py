"""Heat maps as one HTML page that needs no library, no script and no network."""

from __future__ import annotations

import base64
import html
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

FLOOR = 1e-4  # where the colors end
_COLORS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # viridis, dark to light
_EMPTY = (0, 0, 0, 0)

Pixel = tuple[int, int, int, int]  # red, green, blue, opacity

_PAGE = """<!doctype html>
<meta charset="utf-8">
<style>
body {{ font: 12px/1.4 system-ui, sans-serif; color: #1f2933; background: #fff; margin: 8px; }}
main {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 16px; }}
figure {{ margin: 0; display: grid; grid-template-columns: auto 1fr; }}
figcaption {{ grid-column: 2; font-weight: 600; }}
img {{ width: 100%; height: 160px; image-rendering: pixelated; border: 1px solid #d9dee5; }}
.y {{ display: flex; flex-direction: column; justify-content: space-between; text-align: right; padding-right: 4px; }}
.x {{ grid-column: 2; display: flex; justify-content: space-between; }}
.key {{ height: 10px; width: 160px; display: inline-block; background: linear-gradient(to right, {gradient}); }}
</style>
<p>{title}: {low} <span class="key"></span> {high}</p>
<main>
{figures}
</main>
"""

_FIGURE = """<figure><figcaption>{title}</figcaption>
<div class="y"><span>{top}</span><span>{y_title}</span><span>{bottom}</span></div>
<img alt="{title}: {y_title} over {x_title}" src="data:image/png;base64,{image}">
<div class="x"><span>{left}</span><span>{x_title}</span><span>{right}</span></div></figure>"""


@dataclass(frozen=True)
class HeatMap:
    """A matrix of values between 0 and 1, with the labels of its axes.

    Attributes:
        title: What is shown.
        x_title: What the columns are.
        x: A number for each column.
        y_title: What the rows are.
        y: A number for each row, the first at the top.
        rows: A share for each cell, on a logarithmic scale from ``FLOOR`` to 1; None for an empty one.
    """

    title: str
    x_title: str
    x: Sequence[int]
    y_title: str
    y: Sequence[int]
    rows: Sequence[Sequence[float | None]]


def heat_map_page(title: str, maps: Sequence[HeatMap]) -> str:
    """The page's source.

    Args:
        title: What the colors are.
        maps: Each with a row and a column at least.
    """
    stops = [color(FLOOR ** (1 - place / 8)) for place in range(9)]
    return _PAGE.format(
        title=html.escape(title),
        low=f"{FLOOR:g}",
        high="1",
        gradient=", ".join("rgb({}, {}, {})".format(*stop) for stop in stops),
        figures="\n".join(map(_figure, maps)),
    )


def color(share: float | None) -> Pixel:
    """The color of a share; those beyond the scale get its ends, and none is transparent."""
    if share is None:
        return _EMPTY
    place = (1.0 - math.log(min(max(share, FLOOR), 1.0)) / math.log(FLOOR)) * (len(_COLORS) - 1)
    low = min(int(place), len(_COLORS) - 2)
    red, green, blue = (round(a + (place - low) * (b - a)) for a, b in zip(_COLORS[low], _COLORS[low + 1], strict=True))
    return red, green, blue, 255


def png(pixels: Sequence[Sequence[Pixel]]) -> bytes:
    """Rows of pixels as a PNG file (ISO/IEC 15948), 8 bits in each of red, green, blue and opacity."""
    header = struct.pack(">2I5B", len(pixels[0]), len(pixels), 8, 6, 0, 0, 0)
    lines = b"".join(b"\0" + bytes(value for pixel in row for value in pixel) for row in pixels)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def _figure(heat_map: HeatMap) -> str:
    image = png([[color(share) for share in row] for row in heat_map.rows])
    return _FIGURE.format(
        title=html.escape(heat_map.title),
        x_title=html.escape(heat_map.x_title),
        y_title=html.escape(heat_map.y_title),
        top=heat_map.y[0],
        bottom=heat_map.y[-1],
        left=heat_map.x[0],
        right=heat_map.x[-1],
        image=base64.b64encode(image).decode(),
    )
