"""Lines of text made of spans, cut and wrapped by terminal cells; columns fitted into a width.

A tone says what a span means and never stands alone: severity has its word or letter, losses have theirs. Names
come from pods, programs and devices, which may hold anything: control characters are replaced here, and nothing
here or behind it reads markup.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, TypeAlias

Tone: TypeAlias = Literal["", "critical", "warning", "info", "good", "dim", "title"]


class Span(NamedTuple):
    text: str
    tone: Tone = ""


Line: TypeAlias = tuple[Span, ...]


class Heading(NamedTuple):
    name: str
    begin: int
    end: int
    """Cells [begin, end) of the heading line."""


def clean(text: str) -> str:
    """Without anything that a terminal would act on."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def cells(text: str) -> int:
    """Columns that a text takes on a terminal."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(c) or unicodedata.category(c) == "Cf"
        else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )  # fmt: skip


def cut(text: str, width: int, *, middle: bool = False) -> str:
    """Cleaned, and at most `width` cells: what is left out is marked with an ellipsis."""
    text = clean(text)
    if cells(text) <= width:
        return text
    if width <= 1:
        return "…"[:width]
    tail = (width - 1) // 2 if middle else 0
    head = _take(text, width - 1 - tail)
    return head + "…" + (_take(text[::-1], tail)[::-1] if tail else "")


def _take(text: str, width: int) -> str:
    if text.isascii():
        return text[:width]
    end = used = 0
    for end, character in enumerate(text):
        used += cells(character)
        if used > width:
            return text[:end]
    return text[: end + 1]


def wrap(text: str, width: int, indent: str = "") -> list[str]:
    """Lines of at most `width` cells, broken at spaces, all but the first behind `indent`."""
    lines: list[str] = []
    text = clean(text)
    words = text.split()
    line = text[: len(text) - len(text.lstrip())]
    fresh = True
    for word in words:
        candidate = line + word if fresh else f"{line} {word}"
        if cells(candidate) > width and not fresh:
            lines.append(line)
            candidate = indent + word
        while cells(candidate) > width:
            part = _take(candidate, width)
            lines.append(part)
            candidate = indent + candidate[len(part) :]
        line, fresh = candidate, False
    return [*lines, line]


def command_lines(command: str, width: int, indent: str) -> list[str]:
    """A shell command in lines that a shell joins again: never cut, broken outside quotes only."""
    lines: list[str] = []
    line = ""
    for word in _shell_words(clean(command)):
        if line.strip() and cells(line) + 1 + cells(word) > width - 2:
            lines.append(line + " \\")
            line = indent + word
        else:
            line = f"{line} {word}" if line else word
    return [*lines, line]


def _shell_words(command: str) -> list[str]:
    words, quote = [""], ""
    for character in command:
        if character == " " and not quote:
            words.append("")
            continue
        words[-1] += character
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
    return [word for word in words if word]


def plain(line: Line) -> str:
    return "".join(span.text for span in line).rstrip()


def say(text: str, tone: Tone = "") -> Line:
    return (Span(text, tone),)


def within(line: Line, width: int) -> list[Line]:
    """A line, or its text in several where it is too wide."""
    text = plain(line)
    return [line] if cells(text) <= width else [say(part, line[0].tone) for part in wrap(text, width, "  ")]


def section(title: str, lines: Iterable[str], width: int, tone: Tone = "") -> list[Line]:
    """A title behind an empty line, and sentences indented below it."""
    wrapped = [say(part, tone) for line in lines for part in wrap("  " + line, width, "    ")]
    return [(), say(title, "title"), *wrapped]


def beside(left: Sequence[Line], right: Sequence[Line], left_width: int) -> list[Line]:
    """Two blocks of lines next to each other, the right one beginning GAP cells behind `left_width`."""
    lines: list[Line] = []
    for i in range(max(len(left), len(right))):
        begin = left[i] if i < len(left) else ()
        if i < len(right) and right[i]:
            fill = left_width + GAP - sum(cells(span.text) for span in begin)
            begin = (*begin, Span(" " * fill), *right[i])
        lines.append(begin)
    return lines


class Column(NamedTuple):
    name: str
    """What sorting calls it."""
    title: str
    width: int
    """Cells it gets at least."""
    grow: int = 0
    """Its share of what is left over."""
    right: bool = False
    """A number: set to the right, and never cut."""
    rank: int = 0
    """Where room is short the highest rank goes first; 0 stays."""
    middle: bool = False
    """Cut in the middle: names of pods differ at their ends."""


class Record(NamedTuple):
    """A table row before layout: what is shown, and what it is sorted by, per column."""

    cells: tuple[str, ...]
    values: tuple[float | str, ...]
    tone: Tone = ""


GAP = 2
LEAST_CELLS = 4
"""A cut text column never gets narrower."""


def fit(columns: Sequence[Column], records: Sequence[Record], width: int, *, fill: bool) -> list[tuple[int, int]]:
    """(index, cells) of the columns that there is room for.

    `fill` spreads them over the whole width, whatever they hold, so that a live table does not shake.
    """
    longest = [
        max([cells(column.title), *(cells(record.cells[i]) for record in records)]) for i, column in enumerate(columns)
    ]
    least = [
        max(column.width, longest[i]) if column.right else column.width if fill else min(column.width, longest[i])
        for i, column in enumerate(columns)
    ]
    shown = list(range(len(columns)))

    def spare() -> int:
        return width - sum(least[i] for i in shown) - GAP * (len(shown) - 1)

    while spare() < 0 and any(columns[i].rank for i in shown):
        shown.remove(max(shown, key=lambda i: columns[i].rank))
    widths = {i: least[i] for i in shown}
    while spare() < 0 and any(widths[i] > LEAST_CELLS and not columns[i].right for i in shown):
        widest = max((i for i in shown if not columns[i].right), key=lambda i: widths[i])
        least[widest] -= 1
        widths[widest] -= 1
    left = spare()
    while left > 0:
        takers = [i for i in shown if columns[i].grow and (fill or widths[i] < longest[i])]
        if not takers:
            break
        total = sum(columns[i].grow for i in takers)
        gave = 0
        for i in takers:
            want = max(left * columns[i].grow // total, 1)
            give = min(want, left - gave, want if fill else longest[i] - widths[i])
            widths[i] += give
            gave += give
        left -= gave
    return [(i, widths[i]) for i in shown]


def heading_line(
    columns: Sequence[Column], fitted: Sequence[tuple[int, int]], sort: str, *, rising: bool
) -> tuple[Line, tuple[Heading, ...]]:
    spans, headings, at = [], [], 0
    for i, width in fitted:
        column = columns[i]
        title = column.title
        if column.name == sort:
            mark = "▲" if rising else "▼"
            title = cut(title, width - 1) + mark
        spans.append(Span(_padded(title, width, column), "title"))
        headings.append(Heading(column.name, at, at + width))
        at += width + GAP
    return _spaced(spans), tuple(headings)


def _padded(text: str, width: int, column: Column) -> str:
    text = cut(text, width, middle=column.middle)
    fill = " " * (width - cells(text))
    return fill + text if column.right else text + fill


def _spaced(spans: Sequence[Span]) -> Line:
    line: list[Span] = []
    for span in spans:
        if line:
            line.append(Span(" " * GAP))
        line.append(span)
    return tuple(line)


def row_line(columns: Sequence[Column], fitted: Sequence[tuple[int, int]], record: Record) -> Line:
    return _spaced([Span(_padded(record.cells[i], width, columns[i]), record.tone) for i, width in fitted])


def table(columns: Sequence[Column], records: Sequence[Record], width: int) -> list[Line]:
    """A table as text: its heading and a line per record, as wide as needed and at most `width`."""
    fitted = fit(columns, records, width, fill=False)
    titles, _ = heading_line(columns, fitted, "", rising=False)
    return [titles, *(row_line(columns, fitted, record) for record in records)]
