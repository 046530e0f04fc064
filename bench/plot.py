"""Bars with their ratio, as an SVG that reads on light and on dark pages."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

_WIDTH, _ROW, _LABELS, _VALUES = 760, 26, 250, 200
_STYLE = """
text { font: 13px sans-serif; fill: #1f2328; }
.title { font-weight: bold; }
.value { fill: #59636e; }
.other { fill: #8c959f; }
.ours { fill: #0969da; }
.floor { fill: #1a7f37; }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc; }
  .value { fill: #9198a1; }
  .other { fill: #656c76; }
  .ours { fill: #4493f8; }
  .floor { fill: #3fb950; }
}
"""

Bar = tuple[str, float, float, str]  # label, ms, ratio, "ours", "floor" or "other"


def plot(groups: dict[str, list[Bar]], unit: str) -> str:
    """An SVG of groups of bars, each with its milliseconds and its ratio, all to one scale."""
    most = max(ms for bars in groups.values() for _, ms, _, _ in bars)
    rows = list(_rows(groups, most, unit))
    height = (sum(len(bars) + 2 for bars in groups.values())) * _ROW
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" role="img">'
    )
    return "\n".join([head, f"<style>{_STYLE}</style>", *rows, "</svg>"]) + "\n"


def _rows(groups: dict[str, list[Bar]], most: float, unit: str) -> Iterator[str]:
    y = _ROW
    scale = (_WIDTH - _LABELS - _VALUES) / most
    for title, bars in groups.items():
        yield _text(8, y, title, "title")
        y += _ROW
        for label, ms, ratio, kind in bars:
            yield _text(_LABELS - 8, y, label, "label", "end")
            yield (
                f'<rect class="{kind}" x="{_LABELS}" y="{y - 14}" rx="2" '
                f'width="{max(ms * scale, 1):.1f}" height="18"/>'
            )
            value = f"{ms:.1f} ms, {ratio:.2f} {unit}"
            yield _text(_LABELS + ms * scale + 8, y, value, "value")
            y += _ROW
        y += _ROW


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'
