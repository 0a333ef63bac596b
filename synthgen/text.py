"""Text for people: tables, times and sizes that fit a console. Plain characters, no markup."""

from __future__ import annotations

import re
import textwrap
import unicodedata
from collections.abc import Collection, Sequence

__all__ = ["WIDTH", "columns", "counted", "duration", "fit", "plain", "size", "table", "wrap"]

WIDTH = 100  # columns of a page
_PLURAL = re.compile(r"^([^(]*?\w)s\b")  # up to the first word that is one, and none in brackets


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int] = (), *, whole: bool = False
) -> list[str]:
    """Aligned columns; an empty last column is left out, and a long one is cut at the page's edge.

    With ``whole`` nothing is cut: for files and pipes, which have no edge.
    """
    cells = [[plain(cell) for cell in row] for row in (head, *rows)]
    if not any(row[-1] for row in cells[1:]):
        cells = [row[:-1] for row in cells]
    num = len(cells[0])
    widths = [max(columns(row[index]) for row in cells) for index in range(num)]
    if not whole:
        widths[:-1] = [min(width, 28) for width in widths[:-1]]
        widths[-1] = max(8, min(widths[-1], WIDTH - sum(widths[:-1]) - 2 * (num - 1)))
    lines = []
    for row in cells:
        fitted = [fit(cell, width) for cell, width in zip(row, widths, strict=True)]
        padded = [
            " " * (width - columns(cell)) + cell if index in right else cell + " " * (width - columns(cell))
            for index, (cell, width) in enumerate(zip(fitted, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return lines


def fit(text: str, width: int) -> str:
    """Text cut to ``width`` columns, with an ellipsis where something is left out."""
    if columns(text) <= width:
        return text
    while text and columns(text) > width - 1:
        text = text[:-1]
    return text + "…"


def columns(text: str) -> int:
    """How wide a console draws a text: East Asian wide characters take two columns, combining ones none."""
    return sum(0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in "WF") for char in text)


def plain(text: str) -> str:
    """Text without control characters: a prompt must not steer the console."""
    return "".join(char if char.isprintable() else " " for char in text)


def wrap(text: str) -> list[str]:
    """Text in lines of a page's width, all but the first indented."""
    return textwrap.wrap(plain(text), WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def counted(count: int, many: str) -> str:
    """A count and what it counts, which is given for many: "2 failed samples", but "1 failed sample"."""
    said = _PLURAL.sub(r"\1", many) if count == 1 else many
    return f"{count:,} {said}"


def duration(seconds: float) -> str:
    """A time for people: 0.4 s, 75 s as 1 min 15 s, 3 h 02 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: int) -> str:
    """Bytes for people, in powers of 1000."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" or value >= 99.5 else f"{value:.2g} {unit}"
        value /= 1000
    raise AssertionError  # the loop ends in its last round
