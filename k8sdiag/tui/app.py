"""The screen of `top` and `replay`: pulls the latest Snapshot and draws one tab of it, wherever it is from."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from typing import ClassVar, Protocol, cast

import msgspec
from textual import events, on
from textual.app import App, ComposeResult, SystemCommand
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.screen import ModalScreen, Screen
from textual.widgets import ContentSwitcher, Footer, Input, OptionList, Static

from k8sdiag import details, tracking, views, words
from k8sdiag.errors import K8sdiagError, UsageError
from k8sdiag.layout import Line, Span, cells, cut, plain, say, wrap
from k8sdiag.snapshot import ConntrackRow, Snapshot
from k8sdiag.source import Paced, Source
from k8sdiag.tui.feed import Feed, Folding
from k8sdiag.tui.table import RowList, painted
from k8sdiag.tui.terminal import TerminalDriver, leaving_on_signals
from k8sdiag.views import Page, Subject, ViewState

TABS = (
    ("verdict", "Verdict"), ("pods", "Pods"), ("drops", "Drops"),
    ("conntrack", "Conntrack"), ("encap", "Encap"), ("node", "Node"),
)  # fmt: skip
PAGES: dict[str, Callable[[Snapshot, ViewState, int], Page]] = {
    "verdict": views.finding_page,
    "pods": views.owner_page,
    "drops": views.drop_page,
    "conntrack": views.conntrack_page,
}
NOT_YET = {
    "encap": (
        "Encapsulation: n/a, not measured yet.",
        "Until this tab is built: ip -s -d link show type vxlan (geneve, ipip, wireguard …).",
        "Drops on tunnel devices are counted: see 3 Drops.",
    ),
}
HELP_NOTES = f"""\
Severity: C critical, W warning, I information. Rates are those of the last {words.RATE_WINDOW}. Counts are packets of \
the window named in the head, and exact unless it says LOST.
Filter: all words must match; !word excludes; field=glob and field!=glob ask one of these fields: \
{", ".join(views.FILTER_FIELDS)}.
Pausing and zeroing change what is shown; recording goes on. Benign drops are those that every healthy machine makes.\
""".splitlines()
INTERVALS_S = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
SPEEDS = (0.25, 0.5, 1.0, 2.0, 4.0, 10.0, 30.0, 60.0)
CHROME_LINES = 5
"""Lines that are not a tab's own: the head, the tabs, the foot, and the rule between a list and what is below it."""
BEGIN_S = 3.0
"""How long run() waits for the first reading before it opens the screen: what fails at once fails without one."""


class LatestFeed(Protocol):
    """What the screen needs of a Feed."""

    @property
    def error(self) -> Exception | None: ...

    @property
    def ended(self) -> bool: ...

    def latest(self) -> Snapshot | None: ...

    def zero(self) -> None: ...


class ListTab(Vertical):
    """A list, a line on what it does not show, and what the cursor is on."""

    def __init__(self, page_of: Callable[[int], Page], name: str) -> None:
        super().__init__(id=name)
        self.rows = RowList(page_of, id=f"{name}-rows")
        self.note = Static(classes="note", markup=False)
        self.about = Static(classes="about", markup=False)
        self.more = Static(markup=False)

    def compose(self) -> ComposeResult:
        yield self.rows
        yield self.note
        yield self.about
        with VerticalScroll(classes="more", can_focus=False):
            yield self.more


class TextTab(VerticalScroll):
    """A page of text."""

    def __init__(self, name: str) -> None:
        super().__init__(id=name)
        self.text = Static(markup=False)

    def compose(self) -> ComposeResult:
        yield self.text


class TabStrip(Static):
    """The tabs, the active one in brackets; what is filtered behind them."""

    def __init__(self) -> None:
        super().__init__(id="tabs", markup=False)

    def show(self, active: str, said: Line) -> None:
        line: list[Span] = []
        for i, (name, title) in enumerate(TABS, 1):
            text = f"[{i} {title}]" if name == active else f" {i} {title} "
            line.append(Span(text, "title" if name == active else ""))
        room = self.size.width - sum(cells(span.text) for span in line) - 1
        if said and room > 0:
            line += [Span(" "), Span(cut(plain(said), room), said[0].tone)]
        self.update(painted([tuple(line)]), layout=False)

    def on_click(self, event: events.Click) -> None:
        at = 0
        for i, (name, title) in enumerate(TABS, 1):
            at += len(f" {i} {title} ")
            if event.x - 1 < at:
                cast("TopApp", self.app).action_tab(name)
                return


class Reading(ModalScreen[None]):
    """A page to read: details, help, an explanation, an error. Esc closes it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,enter", "dismiss", "Back"),
        Binding("q", "app.quit", "Quit"),
        Binding("y", "app.copy", "Copy", show=False),
        Binding("e", "app.explain", "Explain", show=False),
        Binding("down,j", "scroll(1)", "Down", show=False),
        Binding("up,k", "scroll(-1)", "Up", show=False),
        Binding("g,home", "edge(0)", "Begin", show=False),
        Binding("G,end", "edge(1)", "End", show=False),
    ]

    def __init__(self, title: str, lines_of: Callable[[int], list[Line]], subject: Subject | None = None) -> None:
        super().__init__()
        self.subject = subject
        self._title = title
        self._lines_of = lines_of
        self._scroll = VerticalScroll(can_focus=False)
        self._text = Static(markup=False)

    def compose(self) -> ComposeResult:
        yield Static(self._title, classes="title", markup=False)
        with self._scroll:
            yield self._text
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        self._draw()

    def on_resize(self, _event: events.Resize) -> None:
        self._draw()

    def _draw(self) -> None:
        self._text.update(painted(self._lines_of(max(self.app.size.width - 1, 20))))

    def action_scroll(self, lines: int) -> None:
        self._scroll.scroll_relative(y=lines, animate=False)

    def action_edge(self, end: int) -> None:
        (self._scroll.scroll_end if end else self._scroll.scroll_home)(animate=False)


class Picking(ModalScreen[str | None]):
    """Choose one of a few names."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "Back"),
        Binding("q", "app.quit", "Quit", show=False),
        Binding("j", "move(1)", show=False),
        Binding("k", "move(-1)", show=False),
    ]

    def __init__(self, names: Sequence[tuple[str, str]]) -> None:
        super().__init__()
        self._names = names
        """(what is shown, what is meant)"""

    def compose(self) -> ComposeResult:
        yield OptionList(*(shown for shown, _ in self._names), markup=False)

    def action_move(self, rows: int) -> None:
        options = self.query_one(OptionList)
        (options.action_cursor_down if rows > 0 else options.action_cursor_up)()

    @on(OptionList.OptionSelected)
    def chosen(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(self._names[event.option_index][1])


class TopApp(App[int]):
    """Shows what `feed` has, once an interval. `mode` says in words what is watched ("live", "replay FILE")."""

    CSS_PATH = "k8sdiag.tcss"
    TITLE = "k8sdiag"
    ENABLE_COMMAND_PALETTE = True
    VERTICAL_BREAKPOINTS = [(0, "-short"), (32, "-tall")]  # noqa: RUF012 - as Textual declares it
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "Quit", id="quit"),
        Binding("ctrl+c", "quit", "Quit", id="interrupt", show=False, priority=True),
        Binding("question_mark,h,f1", "help", "Help", id="help", key_display="?"),
        Binding("slash", "filter", "Filter", id="filter", key_display="/"),
        Binding("e", "explain", "Explain", id="explain"),
        Binding("y", "copy", "Copy", id="copy", tooltip="Copy the fix, or the row, to the terminal's clipboard"),
        Binding("n", "namespace", "Namespace", id="namespace", tooltip="Choose a namespace"),
        Binding("space", "pause", "Pause", id="pause", tooltip="Pause the screen (a replay: the replay)"),
        *(
            Binding(str(i), f"tab('{name}')", f"{title} tab", id=f"tab-{name}", show=False)
            for i, (name, title) in enumerate(TABS, 1)
        ),
        Binding("tab", "next_tab(1)", "Next tab", id="next-tab", show=False, priority=True),
        Binding("shift+tab", "next_tab(-1)", "Previous tab", id="previous-tab", show=False, priority=True),
        Binding(
            "greater_than_sign",
            "sort(1)",
            "Sort",
            id="sort-right",
            key_display="< >",
            tooltip="Sort by the column to the right",
        ),
        Binding("less_than_sign", "sort(-1)", "Sort by the column to the left", id="sort-left", show=False),
        Binding("r", "reverse", "Reverse the order", id="reverse", show=False),
        Binding("t", "group", "Group pods by namespace, workload, pod", id="group", show=False),
        Binding("a", "all_drops", "Show benign drops too, or not", id="all-drops", show=False),
        Binding("z", "zero", "Zero: count and judge from now on", id="zero", show=False),
        Binding("plus,equals_sign", "faster(1)", "Renew more often (replay: faster)", id="faster", show=False),
        Binding("minus", "faster(-1)", "Renew less often (replay: slower)", id="slower", show=False),
        Binding("P", "save", "Save what is shown as SVG and JSON", id="save", show=False),
        Binding("escape", "back", "Back: close, clear the filter, leave a namespace", id="back", show=False),
        Binding("colon", "command_palette", "Command palette", id="palette", show=False),
    ]

    def __init__(
        self,
        feed: LatestFeed,
        mode: str,
        *,
        interval_s: float = 1.0,
        explain: Callable[[str], str] = lambda slug: f"No explanation of {slug} here.",
        state: ViewState | None = None,
        paced: Paced | None = None,
        as_json: Callable[[Snapshot], bytes] = msgspec.json.encode,
        end_with_source: bool = False,
    ) -> None:
        super().__init__(ansi_color=True)
        self.animation_level = "none"
        self.feed = feed
        self.mode = mode
        self.shown: Snapshot | None = None
        self.tab = "verdict"
        self.paused = False
        self.interval_s = interval_s
        self.states = {name: state or ViewState() for name, _ in TABS}
        self._explain = explain
        self._paced = paced
        self._as_json = as_json
        self._end_with_source = end_with_source
        self.on_leave: Callable[[], None] = lambda: None
        """Called first thing when the screen is left, so that the source ends while the terminal is restored."""
        self._asked_to_leave = False
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self._error_shown = False
        self._filter_fault = ""
        self._drilled: list[dict[str, ViewState]] = []
        self._list_tabs = {name: ListTab(lambda width, name=name: self._page(name, width), name) for name in PAGES}  # type: ignore[misc]
        self._text_tabs = {name: TextTab(name) for name, _ in TABS if name not in PAGES}
        self._head = Static(id="head", markup=False)
        self._strip = TabStrip()
        self._input = Input(
            placeholder="word  !word  reason=NETFILTER*  ns=shop   (Enter, Esc)", id="filter", compact=True
        )

    def compose(self) -> ComposeResult:
        yield self._head
        yield self._strip
        with ContentSwitcher(initial=self.tab, id="views"):
            yield from self._list_tabs.values()
            yield from self._text_tabs.values()
        yield self._input
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        if "TEXTUAL_THEME" not in os.environ:
            self.theme = "ansi-dark"
        self._event_loop = asyncio.get_running_loop()
        if self._asked_to_leave:
            self._leave()
        self._list_tabs[self.tab].rows.focus()
        self._timer = self.set_interval(self.interval_s, self.pull)
        self.pull()

    def on_unmount(self) -> None:
        self._event_loop = None

    # Drawing

    def pull(self) -> None:
        """Fetch and draw what is new."""
        latest = self.feed.latest()
        if self.feed.error is not None and not self._error_shown:
            self._error_shown = True
            if latest is None:
                self._leave(1)
                return
            self.push_screen(Reading("Watching has ended", self._error_lines))
        if self._end_with_source and self.feed.ended and self.feed.error is None:
            self._leave()
            return
        if not self.paused and latest is not self.shown:
            self.shown = latest
            self.draw()
        else:
            self._draw_head()

    def draw(self) -> None:
        """The head and the tab in front."""
        with self.batch_update():
            self._draw_head()
            self._draw_tabs()
            if self.tab in self._list_tabs:
                self._list_tabs[self.tab].rows.reload()
            else:
                self._text_tabs[self.tab].text.update(painted(self._words(self.tab)))

    def _page(self, name: str, width: int) -> Page:
        if self.shown is None:
            return Page((), (), (), 0, ())
        return PAGES[name](self.shown, self.states[name], width)

    def _words(self, name: str) -> list[Line]:
        width = max(self.size.width - 3, 20)
        if name in NOT_YET:
            return [say(part) for line in NOT_YET[name] for part in wrap(line, width)]
        return views.node_lines(self.shown, width) if self.shown else [say("waiting for the first reading …")]

    def _draw_head(self) -> None:
        width = max(self.size.width - 2, 20)
        self._head.update(painted(views.head_lines(self.shown, self.mode, self._badges(), width)), layout=False)

    def _badges(self) -> list[Span]:
        badges = []
        if self.feed.error is not None:
            badges.append(Span("STOPPED BY AN ERROR", "critical"))
        elif self.feed.ended:
            badges.append(Span("ENDED", "warning"))
        if self.paused:
            latest = self.feed.latest()
            behind_s = (latest.t_ns - self.shown.t_ns) / 1e9 if latest and self.shown else 0
            badges.append(Span("PAUSED" + (f" {words.duration(behind_s)} behind" if behind_s else ""), "warning"))
        return badges

    def _draw_tabs(self) -> None:
        state = self.states[self.tab]
        said = []
        if self._filter_fault:
            self._strip.show(self.tab, say(self._filter_fault, "critical"))
            return
        if state.filter:
            said.append(f"filter: {state.filter} (Esc clears)")
        if state.namespaces:
            said.append("ns: " + ", ".join(name or "(none)" for name in state.namespaces))
        if self.tab == "pods":
            said.append(f"by {state.grouping} (t)")
        self._strip.show(self.tab, say("  ".join(said), "warning" if state.filter or state.namespaces else "dim"))

    @on(RowList.Moved)
    def _draw_about(self) -> None:
        tab = self._list_tabs.get(self.tab)
        if tab is None:
            return
        width = max(self.size.width - 4, 20)
        page, row = tab.rows.page, tab.rows.row
        tab.set_class(row is None, "-empty")
        note = [page.note] if page.note else []
        if page.hidden:
            note.append(say(f"+{words.number(page.hidden)} more rows; / filters", "dim"))
        if row is None and self.shown is None:
            note = [say("Waiting for the first reading …")]
        elif row is None and self.tab == "verdict" and self.shown is not None and not self.shown.findings:
            note = views.healthy_lines(self.shown, width)
        tab.note.update(painted(note))
        tab.note.display = bool(note)
        tab.about.display = self.tab not in ("verdict", "conntrack")
        if row is not None and self.shown is not None:
            tab.about.update(painted(details.about(row.subject, width)), layout=False)
            if isinstance(row.subject, ConntrackRow):
                room = self.size.height - CHROME_LINES - min(tab.rows.lines, self.size.height // 3)
                lines = tracking.page_lines(self.shown, row.subject, width, room)
            else:
                lines = details.detail(self.shown, row.subject, width)
            tab.more.update(painted(lines))

    def on_resize(self, _event: events.Resize) -> None:
        self.call_after_refresh(self.draw)

    def _error_lines(self, width: int) -> list[Line]:
        text = str(self.feed.error) or type(self.feed.error).__name__
        lines = [say(part, "critical") for line in text.splitlines() for part in wrap(line, width)]
        rest = "Nothing is counted any more; what was counted stays on the screen. Esc shows it, q quits."
        return [*lines, (), *(say(part) for part in wrap(rest, width))]

    # Keys

    def _update(self, *, everywhere: bool = False, **changes: object) -> None:
        """Change the state of this tab, or of all, and draw."""
        for name in self.states if everywhere else (self.tab,):
            self.states[name] = msgspec.structs.replace(self.states[name], **changes)
        self.draw()

    async def action_quit(self) -> None:
        self._leave()

    def leave(self) -> bool:
        """Ask it to end; from any thread, a signal handler too. Always True: there is a screen to leave."""
        self._asked_to_leave = True
        self.on_leave()
        if self._event_loop is not None:
            self._event_loop.call_soon_threadsafe(self._leave)
        return True

    def _leave(self, code: int = 0) -> None:
        self.on_leave()
        self.exit(code)

    def action_tab(self, name: str) -> None:
        if isinstance(self.screen, ModalScreen):
            return
        self.tab = name
        self.query_one("#views", ContentSwitcher).current = name
        (self._list_tabs[name].rows if name in self._list_tabs else self._text_tabs[name]).focus()
        self.draw()

    def action_next_tab(self, step: int) -> None:
        names = [name for name, _ in TABS]
        self.action_tab(names[(names.index(self.tab) + step) % len(names)])

    def action_help(self) -> None:
        self.push_screen(Reading("Keys", self._help_lines))

    def _help_lines(self, width: int) -> list[Line]:
        lines: list[Line] = [say("Arrows j k PgUp PgDn g G move, Enter opens, mouse works too."), ()]
        for binding in self._keys():
            keys = " ".join(_key_names(binding))
            lines += [(Span(f"{keys:<14}", "title"), Span(cut(binding.tooltip or binding.description, width - 14)))]
        for note in HELP_NOTES:
            lines += [(), *(say(part) for part in wrap(note, width))]
        return lines

    def _keys(self) -> list[Binding]:
        return [binding for binding in self.BINDINGS if isinstance(binding, Binding)]

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        del screen
        for binding in self._keys():
            if binding.action == "command_palette" or binding.id == "interrupt":
                continue
            keys = " ".join(_key_names(binding))
            yield SystemCommand(binding.tooltip or binding.description, f"key {keys}", _runner(self, binding.action))
        yield SystemCommand("Theme", "other colours", self.action_change_theme)

    def action_filter(self) -> None:
        self._input.add_class("-open")
        self._input.value = self.states[self.tab].filter
        self._input.focus()

    @on(Input.Changed, "#filter")
    def _filter_typed(self, event: Input.Changed) -> None:
        if not self._input.has_class("-open"):
            return
        try:
            views.matcher(event.value)
        except UsageError as error:
            self._filter_fault = str(error)
            self._draw_tabs()
            return
        self._filter_fault = ""
        self._update(everywhere=True, filter=event.value.strip())

    @on(Input.Submitted, "#filter")
    def _close_filter(self) -> None:
        self._input.remove_class("-open")
        self._filter_fault = ""
        self.action_tab(self.tab)

    async def action_back(self) -> None:
        if self._input.has_class("-open"):
            self._update(everywhere=True, filter="")
            self._close_filter()
        elif self.states[self.tab].filter:
            self._update(everywhere=True, filter="")
        elif self._drilled:
            self.states = self._drilled.pop()
            self._rewind()
        elif self.states[self.tab].namespaces:
            self._update(everywhere=True, namespaces=())

    def _rewind(self) -> None:
        """Another list from its top."""
        for tab in self._list_tabs.values():
            tab.rows.to_top()
        self.draw()

    def action_sort(self, step: int) -> None:
        tab = self._list_tabs.get(self.tab)
        shown = [heading.name for heading in tab.rows.page.headings] if tab else []
        if tab is None or not shown:
            return
        now = tab.rows.page.sort
        at = shown.index(now) if now in shown else 0
        self._update(sort=shown[(at + step) % len(shown)], reverse=False)

    @on(RowList.Headed)
    def _sort_by(self, event: RowList.Headed) -> None:
        state = self.states[self.tab]
        same = self._list_tabs[self.tab].rows.page.sort == event.column
        self._update(sort=event.column, reverse=not state.reverse if same else False)

    def action_reverse(self) -> None:
        self._update(reverse=not self.states[self.tab].reverse)

    def action_group(self) -> None:
        groupings = views.GROUPINGS
        now = groupings.index(self.states["pods"].grouping)
        state = msgspec.structs.replace(self.states["pods"], grouping=groupings[(now + 1) % len(groupings)])
        self.states["pods"] = state
        self._list_tabs["pods"].rows.to_top()
        self.action_tab("pods")

    def action_all_drops(self) -> None:
        self._update(everywhere=True, all_drops=not self.states[self.tab].all_drops)

    def action_namespace(self) -> None:
        if self.shown is None:
            return
        names = [(name or "(in no namespace)", name) for name in views.namespaces(self.shown)]

        def choose(name: str | None) -> None:
            if name is not None:
                self._update(everywhere=True, namespaces=() if name == ALL_NAMESPACES else (name,))

        self.push_screen(Picking([("all namespaces", ALL_NAMESPACES), *names]), choose)

    def action_pause(self) -> None:
        self.paused = not self.paused
        if self._paced is not None:
            self._paced.paused = self.paused
        self.pull()

    def action_zero(self) -> None:
        self.feed.zero()
        self.notify("Zeroed: what follows is counted and judged from now on.", markup=False, timeout=3)

    def action_faster(self, step: int) -> None:
        if self._paced is not None:
            self._paced.speed = _next(SPEEDS, self._paced.speed, step)
            self.notify(f"Replay at {self._paced.speed:g} times the speed it happened.", markup=False, timeout=2)
            return
        self.interval_s = _next(INTERVALS_S, self.interval_s, -step)
        self._timer.stop()
        self._timer = self.set_interval(self.interval_s, self.pull)
        self.notify(f"The screen is renewed every {words.duration(self.interval_s)}.", markup=False, timeout=2)

    def _subject(self) -> Subject | None:
        """What the cursor is on, or what the page in front is about."""
        if isinstance(self.screen, Reading):
            return self.screen.subject
        tab = self._list_tabs.get(self.tab)
        row = tab.rows.row if tab else None
        return row.subject if row else None

    @on(RowList.Opened)
    def _open(self) -> None:
        subject, snapshot = self._subject(), self.shown
        if subject is None or snapshot is None:
            return
        state = self.states["pods"]
        if isinstance(subject, views.OwnerGroup) and state.grouping != "pod" and len(subject.owners) > 1:
            # Unfold: the same list, narrowed to this namespace and one step finer.
            self._drilled.append(dict(self.states))
            finer = views.GROUPINGS[views.GROUPINGS.index(state.grouping) + 1]
            whose = (subject.owners[0].owner.namespace or "",)
            self.states["pods"] = msgspec.structs.replace(state, namespaces=whose, grouping=finer)
            self._rewind()
            return
        title = details.topic(subject) or "details"
        self.push_screen(
            Reading(f"{title}, as of {views.moment(snapshot)}",
                    lambda width: details.detail(snapshot, subject, width), subject)
        )  # fmt: skip

    def action_explain(self) -> None:
        subject = self._subject()
        topic = details.topic(subject) if subject else ""
        if not topic:
            self.notify("Nothing here to explain: put the cursor on a finding or a drop.", markup=False, timeout=3)
            return
        try:
            text = self._explain(topic)
        except K8sdiagError as error:
            text = str(error)
        self.push_screen(
            Reading(f"explain {topic}",
                    lambda width: [say(part) for line in text.splitlines() for part in wrap(line, width)], subject)
        )  # fmt: skip

    def action_copy(self) -> None:
        subject = self._subject()
        if subject is None:
            return
        text = details.copyable(subject)
        self.copy_to_clipboard(text)
        self.notify(text, title="Sent to the terminal's clipboard", markup=False, timeout=4)

    def action_save(self) -> None:
        """The screen as SVG and the whole Snapshot as JSON, in the current directory."""
        if self.shown is None:
            return
        node = "".join(c if c.isalnum() else "-" for c in (self.shown.node.name if self.shown.node else "node"))
        name = f"k8sdiag-{node}-{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}"
        try:
            _write_new(name + ".svg", self.export_screenshot(title=f"k8sdiag {self.mode}").encode())
            _write_new(name + ".json", self._as_json(self.shown))
        except OSError as error:
            self.notify(f"Not saved: {error.strerror}: {error.filename}", severity="error", markup=False)
            return
        self.notify(f"{os.path.abspath(name)}.svg and .json", title="Saved", markup=False, timeout=6)


ALL_NAMESPACES = "*"


def _runner(app: TopApp, action: str) -> Callable[[], object]:
    async def run_it() -> None:
        await app.run_action(action)

    return run_it


def _key_names(binding: Binding) -> list[str]:
    names = {"question_mark": "?", "slash": "/", "colon": ":", "less_than_sign": "<", "greater_than_sign": ">",
             "plus": "+", "equals_sign": "=", "minus": "-", "escape": "Esc", "space": "Space", "f1": "F1",
             "tab": "Tab", "shift+tab": "Shift+Tab", "ctrl+c": "Ctrl+C"}  # fmt: skip
    return [names.get(key, key) for key in binding.key.split(",")]


def _next(steps: Sequence[float], now: float, step: int) -> float:
    """The neighbour of `now` in a ladder."""
    beyond = [value for value in steps if (value > now if step > 0 else value < now)]
    if not beyond:
        return now
    return min(beyond) if step > 0 else max(beyond)


def _write_new(path: str, content: bytes) -> None:
    """A new file, mode 0600, of the user behind sudo: never one that exists, nor through a link. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        if os.geteuid() == 0 and "SUDO_UID" in os.environ:
            os.fchown(descriptor, int(os.environ["SUDO_UID"]), int(os.environ.get("SUDO_GID", "-1")))
        file.write(content)


def run(
    source: Source,
    engine: Folding,
    mode: str,
    interval_s: float = 1.0,
    explain: Callable[[str], str] = lambda slug: f"No explanation of {slug} here.",
    *,
    state: ViewState | None = None,
    as_json: Callable[[Snapshot], bytes] = msgspec.json.encode,
    end_with_source: bool = False,
) -> int:
    """Show a source until the user leaves. Returns the exit code; the source is closed then, whatever happened.

    What the source raised is raised again once the terminal is as it was: at once where it never began, else when
    the user leaves. `end_with_source` leaves by itself after the last batch. A Paced source is also paused by the
    space bar and takes its speed from + and -.
    """
    if not sys.stdin.isatty() or not sys.stderr.isatty():
        raise UsageError("The screen needs a terminal for its keys and its picture; without one: --once.")
    feed = Feed(source, engine, interval_s)
    app = TopApp(
        feed,
        mode,
        interval_s=interval_s,
        explain=explain,
        state=state,
        paced=source if isinstance(source, Paced) else None,
        as_json=as_json,
        end_with_source=end_with_source,
    )
    app.driver_class = TerminalDriver
    app.on_leave = feed.close
    opened = False
    try:
        with leaving_on_signals(lambda: opened and app.leave()):
            feed.start()
            feed.begun.wait(BEGIN_S)
            if feed.error is None or feed.latest() is not None:
                opened = True
                app.run()
    finally:
        feed.stop()
    if feed.error is not None:
        raise feed.error
    return app.return_code or 0
