"""A list of rows with a cursor that stays on its row, whatever becomes of the order.

Painted line by line (Textual's Line API): rows come laid out from views.py, so that a refresh costs what is visible
and no more, and no name can be taken for markup.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

from k8sdiag.layout import Line, Tone
from k8sdiag.views import Page, Row

GUTTER = "> "
"""Stands before the row the cursor is on: colour is not the only sign."""

# The terminal's own sixteen colours: they fit dark and light backgrounds, and every terminal has them.
STYLES: dict[Tone, Style] = {
    "": Style(),
    "critical": Style(color="red", bold=True),
    "warning": Style(color="yellow", bold=True),
    "info": Style(color="cyan"),
    "good": Style(color="green"),
    "dim": Style(dim=True),
    "title": Style(bold=True),
}
CURSOR = Style(reverse=True)


def painted(lines: list[Line]) -> Text:
    """Lines for a Static widget."""
    text = Text(no_wrap=True, overflow="crop", end="")
    for i, line in enumerate(lines):
        if i:
            text.append("\n")
        for span in line:
            text.append(span.text, STYLES[span.tone])
    return text


class RowList(ScrollView, can_focus=True):
    """Shows the Page that `page_of(width)` gives for the room there is; ask again with reload()."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", "Up", show=False),
        Binding("down,j", "move(1)", "Down", show=False),
        Binding("pageup", "page(-1)", "Page up", show=False),
        Binding("pagedown", "page(1)", "Page down", show=False),
        Binding("home,g", "edge(0)", "First row", show=False),
        Binding("end,G", "edge(-1)", "Last row", show=False),
        Binding("enter", "open", "Details", show=False),
    ]

    class Moved(Message):
        """The cursor is on another row, or on a row that has changed."""

    class Opened(Message):
        """Enter, or a click on the row under the cursor."""

    class Headed(Message):
        """A column title was clicked."""

        def __init__(self, column: str) -> None:
            self.column = column
            super().__init__()

    def __init__(self, page_of: Callable[[int], Page], *, id: str) -> None:  # noqa: A002 - Textual's own word
        super().__init__(id=id)
        self._page_of = page_of
        self._page = Page((), (), (), 0, ())
        self._starts: list[int] = []
        self._lines: list[tuple[int, Line]] = []
        self._at = 0
        self._key: Hashable = None
        """Key of the row under the cursor; None before anybody moved it, so that it stays at the top."""

    @property
    def page(self) -> Page:
        return self._page

    @property
    def lines(self) -> int:
        """Lines it takes to show all of it, the titles too, count."""
        return len(self._lines) + self._head

    @property
    def row(self) -> Row | None:
        """The row under the cursor."""
        return self._page.rows[self._at] if self._page.rows else None

    def reload(self) -> None:
        """Fetch the page anew and keep the cursor on its row; where that is gone, on the line it was."""
        width = self.scrollable_content_region.width
        page = self._page_of(max(width - len(GUTTER), 20))
        if page == self._page and page.rows and self.virtual_size.width == width:
            return
        self._page = page
        rows = page.rows
        keys = [row.key for row in rows]
        line_on_screen = (self._starts[self._at] if self._starts else 0) - self.scroll_offset.y
        if self._key is not None and self._key in keys:
            self._at = keys.index(self._key)
        else:
            self._at = min(self._at, max(len(rows) - 1, 0))
            if self._key is not None and rows:
                self._key = keys[self._at]
        self._starts, self._lines = [], []
        for i, row in enumerate(rows):
            self._starts.append(len(self._lines))
            self._lines += [(i, line) for line in row.lines]
        self.virtual_size = Size(width, len(self._lines) + self._head)
        if self._key is not None and self._starts:
            # The row moves in the list; on the screen it stays where the eye is.
            self.scroll_to(y=self._starts[self._at] - line_on_screen, animate=False, force=True)
        self.refresh()
        self.post_message(self.Moved())

    @property
    def _head(self) -> int:
        return 1 if self._page.heading else 0

    def render_line(self, y: int) -> Strip:
        width = self.scrollable_content_region.width
        if y < self._head:
            return self._strip(" " * len(GUTTER), self._page.heading, Style(), width)
        at = y - self._head + self.scroll_offset.y
        if at >= len(self._lines):
            return Strip.blank(width, self.rich_style)
        i, line = self._lines[at]
        on_cursor = i == self._at
        first = at == self._starts[i]
        gutter = (GUTTER if first else "| ") if on_cursor else " " * len(GUTTER)
        return self._strip(gutter, line, CURSOR if on_cursor and first and self.has_focus else Style(), width)

    def _strip(self, gutter: str, line: Line, over: Style, width: int) -> Strip:
        ground = self.rich_style
        segments = [Segment(gutter, ground + over)]
        segments += [Segment(span.text, ground + STYLES[span.tone] + over) for span in line]
        return Strip(segments).adjust_cell_length(width, ground + over)

    def on_resize(self, _event: events.Resize) -> None:
        self.reload()

    def on_focus(self) -> None:
        self.refresh()

    def on_blur(self) -> None:
        self.refresh()

    def _move_to(self, at: int) -> None:
        if not self._page.rows:
            return
        self._at = max(0, min(at, len(self._page.rows) - 1))
        self._key = self._page.rows[self._at].key
        begin = self._starts[self._at]
        end = begin + len(self._page.rows[self._at].lines)
        top, room = self.scroll_offset.y, self.size.height - self._head
        if begin < top:
            self.scroll_to(y=begin, animate=False, force=True)
        elif end > top + room:
            self.scroll_to(y=end - room, animate=False, force=True)
        self.refresh()
        self.post_message(self.Moved())

    def action_move(self, rows: int) -> None:
        self._move_to(self._at + rows)

    def action_page(self, pages: int) -> None:
        per_row = max(len(self._lines) // max(len(self._page.rows), 1), 1)
        self._move_to(self._at + pages * max((self.size.height - self._head) // per_row, 1))

    def action_edge(self, at: int) -> None:
        self._move_to(len(self._page.rows) - 1 if at < 0 else at)

    def action_open(self) -> None:
        if self.row is not None:
            self.post_message(self.Opened())

    def to_top(self) -> None:
        """Let go of the row the cursor is on: what follows is another list."""
        self._at, self._key = 0, None
        self._page = Page((), (), (), 0, ())
        self.scroll_to(y=0, animate=False, force=True)

    def on_click(self, event: events.Click) -> None:
        if event.y < self._head:
            for heading in self._page.headings:
                if heading.begin <= event.x - len(GUTTER) < heading.end:
                    self.post_message(self.Headed(heading.name))
            return
        at = event.y - self._head + self.scroll_offset.y
        if at < len(self._lines):
            i = self._lines[at][0]
            if i == self._at and self._key is not None:
                self.action_open()
            else:
                self._move_to(i)
