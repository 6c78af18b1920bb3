"""Tables in plain text.

Invariant: no line is wider than asked for, and no number is cut: columns that do not fit stand in a further table below, rows named again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

WIDTH = 160
"""Characters of a line."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, width: int = WIDTH, words: int = 1) -> Iterator[str]:
    """Lines of a table.

    words: leading columns set to the left, cut where they are longer than the numbers leave room for; the others are numbers, and are
    broken into several tables where they are too many.
    """
    numbers = sum(2 + max(len(line[place]) for line in (header, *rows)) for place in range(words, len(header)))
    longest = max(width * 2 // 5, width - numbers) // words
    cells = [[cell if len(cell) <= longest or place >= words else cell[: longest - 1] + "…" for place, cell in enumerate(line)] for line in (header, *rows)]
    widths = [max(len(line[place]) for line in cells) for place in range(len(header))]
    fixed = sum(widths[:words]) + 2 * (words - 1)
    place = words
    while place < len(header) or place == words == len(header):
        end, taken = place, fixed
        while end < len(header) and (end == place or taken + 2 + widths[end] <= width):
            taken += 2 + widths[end]
            end += 1
        for line in cells:
            shown = [f"{line[index]:<{widths[index]}}" for index in range(words)] + [f"{line[index]:>{widths[index]}}" for index in range(place, end)]
            yield "  ".join(shown).rstrip()
        if end == place:
            return
        place = end
