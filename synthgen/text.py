"""Format tables, times and sizes for a console, as plain text without markup."""

from __future__ import annotations

import re
import textwrap
import unicodedata
from collections.abc import Collection, Sequence

__all__ = ["WIDTH", "columns", "counted", "duration", "fit", "plain", "size", "table", "wrap"]

WIDTH = 100  # columns
_PLURAL = re.compile(r"^([^(]*?\w)s\b")  # up to the first plural word outside brackets


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int] = (), *, whole: bool = False
) -> list[str]:
    """Aligned columns; an empty last column is omitted, and long columns are truncated to fit ``WIDTH``.

    With ``whole`` nothing is truncated: for files and pipes.
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
    """Text truncated to ``width`` columns, with an ellipsis if anything was cut off."""
    if columns(text) <= width:
        return text
    while text and columns(text) > width - 1:
        text = text[:-1]
    return text + "…"


def columns(text: str) -> int:
    """The width of a text on a console: East Asian wide characters take two columns, combining marks none."""
    marks = ("Mn", "Me")
    wide = (unicodedata.east_asian_width(char) in "WF" for char in text if unicodedata.category(char) not in marks)
    return sum(1 + is_wide for is_wide in wide)


def plain(text: str) -> str:
    """Text with unprintable characters replaced by spaces: a prompt must not contain terminal control sequences."""
    return "".join(char if char.isprintable() else " " for char in text)


def wrap(text: str) -> list[str]:
    """Text wrapped to ``WIDTH`` columns, all lines but the first indented."""
    return textwrap.wrap(plain(text), WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def counted(count: int, many: str) -> str:
    """A count with its noun, given in the plural: "2 failed samples", but "1 failed sample"."""
    noun = _PLURAL.sub(r"\1", many) if count == 1 else many
    return f"{count:,} {noun}"


def duration(seconds: float) -> str:
    """A duration as text: 0.4 s, 75 s as 1 min 15 s, 3 h 02 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: int) -> str:
    """A number of bytes as text, in units of powers of 1000."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 99.5 else f"{value:.2g} {unit}"
