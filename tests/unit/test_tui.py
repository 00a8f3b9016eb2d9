from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from textual.pilot import Pilot
from textual.widgets import Input

from k8sdiag.errors import TraceError
from k8sdiag.facts import Capability, Lost
from k8sdiag.snapshot import DropRow, Owner, Snapshot
from k8sdiag.source import Batch, Paced
from k8sdiag.tui.app import Reading, TopApp
from k8sdiag.tui.feed import Feed
from tests.unit.snapshots import NODE_NETNS, connections, drop, pod, snapshot, translated

ROOT = Path(__file__).resolve().parents[2]


class ListFeed:
    """Hand-made Snapshots, the newest last; nothing moves but by the test."""

    def __init__(self, *snapshots: Snapshot) -> None:
        self.snapshots = list(snapshots)
        self.error: Exception | None = None
        self.ended = False
        self.zeroed = 0

    def latest(self) -> Snapshot | None:
        return self.snapshots[-1] if self.snapshots else None

    def zero(self) -> None:
        self.zeroed += 1


def piloted(app: TopApp, steps: Callable[[Pilot[int]], Awaitable[None]], size: tuple[int, int] = (80, 24)) -> None:
    async def run() -> None:
        async with app.run_test(size=size) as pilot:
            await pilot.pause()
            await steps(pilot)

    asyncio.run(run())


def screen(app: TopApp) -> list[str]:
    """What the terminal shows."""
    return ["".join(segment.text for segment in strip).rstrip() for strip in app.screen._compositor.render_strips()]


def shown(app: TopApp) -> str:
    return "\n".join(screen(app))


def cursor(app: TopApp) -> str:
    return next(line for line in screen(app) if line.startswith("> "))


async def press(pilot: Pilot[int], *keys: str) -> None:
    for key in keys:
        await pilot.press(key)
        await pilot.pause()


async def renew(pilot: Pilot[int]) -> None:
    app = pilot.app
    assert isinstance(app, TopApp)
    app.pull()
    await pilot.pause()


def three(a: int, b: int, c: int, t_s: int = 60) -> Snapshot:
    rows = [drop(pod("shop", name), packets) for name, packets in (("a-0", a), ("b-0", b), ("c-0", c))]
    return snapshot(rows, t_ns=t_s * 10**9)


def test_the_first_screen_names_who_loses_packets_why_and_what_to_do() -> None:
    app = TopApp(ListFeed(three(23, 29, 31)), "live")

    async def steps(_pilot: Pilot[int]) -> None:
        text = shown(app)
        assert "W shop: nothing listens on the port these packets go to" in text
        assert "83 packets dropped, now 8.3/s" in text
        assert "Fix: ss -lntup" in text
        assert "worker-1" in screen(app)[0]
        assert "lost 0" in screen(app)[1]

    piloted(app, steps)


def test_the_cursor_stays_on_its_row_when_the_order_changes() -> None:
    feed = ListFeed(three(31, 29, 23))
    app = TopApp(feed, "live")

    async def steps(pilot: Pilot[int]) -> None:
        await press(pilot, "3", "j", "j")
        assert cursor(app).startswith("> shop/c-0")
        feed.snapshots.append(three(31, 29, 101))
        await renew(pilot)
        assert cursor(app).startswith("> shop/c-0")
        rows = [line[2:].split()[0] for line in screen(app) if line[2:].startswith("shop/")]
        assert rows[:3] == ["shop/c-0", "shop/a-0", "shop/b-0"]
        feed.snapshots.append(snapshot([drop(pod("shop", "a-0"), 5), drop(pod("shop", "b-0"), 3)]))
        await renew(pilot)
        assert cursor(app).startswith("> shop/")

    piloted(app, steps)


def test_a_cursor_nobody_moved_stays_at_the_worst() -> None:
    feed = ListFeed(three(31, 29, 23))
    app = TopApp(feed, "live")

    async def steps(pilot: Pilot[int]) -> None:
        await press(pilot, "3")
        feed.snapshots.append(three(31, 29, 101))
        await renew(pilot)
        assert cursor(app).startswith("> shop/c-0")

    piloted(app, steps)


def test_the_keys_work_as_soon_as_the_first_drop_shows_on_a_screen_that_was_empty() -> None:
    feed = ListFeed(snapshot([]))
    app = TopApp(feed, "live")

    async def steps(pilot: Pilot[int]) -> None:
        assert "OK: no pod" in shown(app)
        feed.snapshots.append(snapshot([drop(pod("shop", "a-0"), 29), drop(pod("bank", "b-0"), 23)]))
        await renew(pilot)
        await press(pilot, "j")
        assert cursor(app).startswith("> W bank")
        await press(pilot, "enter")
        assert isinstance(app.screen, Reading)
        assert "bank/b-0" in shown(app)

    piloted(app, steps)


def test_pause_freezes_the_view_and_says_how_far_it_is_behind() -> None:
    feed = ListFeed(three(31, 29, 23))
    app = TopApp(feed, "live")

    async def steps(pilot: Pilot[int]) -> None:
        await press(pilot, "space")
        feed.snapshots.append(three(1009, 29, 23, t_s=72))
        await renew(pilot)
        assert "PAUSED 12 s behind" in screen(app)[0]
        assert "83 packets" in shown(app)
        await press(pilot, "space")
        assert "PAUSED" not in shown(app)
        assert "1,061 packets" in shown(app)

    piloted(app, steps)


def test_pausing_a_replay_holds_it_and_plus_makes_it_faster() -> None:
    paced = Paced(_Listed([]))
    app = TopApp(ListFeed(three(31, 29, 23)), "replay x", paced=paced)

    async def steps(pilot: Pilot[int]) -> None:
        held = []
        for _ in range(2):
            await press(pilot, "space")
            held.append(paced.paused)
        assert held == [True, False]
        await press(pilot, "plus")
        assert paced.speed == 2
        await press(pilot, "minus", "minus")
        assert paced.speed == 0.5

    piloted(app, steps)


def test_the_filter_narrows_while_typed_and_escape_clears_it() -> None:
    app = TopApp(ListFeed(three(31, 29, 23)), "live")

    async def steps(pilot: Pilot[int]) -> None:
        await press(pilot, "3", "slash", "b", "minus", "0")
        assert "shop/b-0" in shown(app)
        assert "shop/a-0" not in shown(app)
        await press(pilot, "enter", "2")
        assert "filter: b-0" in screen(app)[2]
        assert " 29 " in cursor(app)
        await press(pilot, "escape", "3")
        assert "shop/a-0" in shown(app)
        await press(pilot, "slash", *"zzz")
        assert "Nothing matches the filter" in shown(app)
        await press(pilot, "escape")
        assert app.query_one("#filter", Input).has_class("-open") is False
        assert "shop/a-0" in shown(app)

    piloted(app, steps)


def test_a_filter_that_cannot_be_understood_says_so_and_changes_nothing() -> None:
    app = TopApp(ListFeed(three(31, 29, 23)), "live")

    async def steps(pilot: Pilot[int]) -> None:
        await press(pilot, "3", "slash")
        app.query_one("#filter", Input).value = "color=red"
        await pilot.pause()
        assert "no field" in screen(app)[2]
        assert "shop/a-0" in shown(app)

    piloted(app, steps)


def test_every_tab_opens_and_what_is_not_measured_says_so() -> None:
    app = TopApp(ListFeed(three(31, 29, 23)), "live")

    async def steps(pilot: Pilot[int]) -> None:
        seen = {}
        for key in "123456":
            await press(pilot, key)
            seen[key] = shown(app)
            assert f"[{key} " in screen(app)[2]
        assert "shop" in seen["2"]
        assert "NO_SOCKET" in seen["3"]
        assert "n/a: conntrack is not watched here" in seen["4"]
        assert "n/a, not measured yet" in seen["5"]
        assert "kfree_skb" in seen["6"]
        assert "Cost of watching: n/a" in seen["6"]
        await press(pilot, "tab")
        assert "[1 Verdict]" in screen(app)[2]

    piloted(app, steps)


def full_table(refused: int = 1301) -> Snapshot:
    api, cart, crawler = pod("payments", "api-0"), pod("shop", "cart-0"), pod("shop", "crawler-0")
    lab = connections([(cart, 31)], owner=Owner("netns", "lab-web"), netns=7, max=1000)
    node = connections([(crawler, 81_000), (cart, 12_000), (api, 7_000)], drop=refused + 23, insert_failed=23)
    rows = [drop(api, refused, "ct-table-full", netns=NODE_NETNS, verdict="refused"), translated(cart, 23)]
    return snapshot(rows, tables=[node, lab], findings=[])


@pytest.mark.parametrize("size", [(80, 24), (120, 30), (200, 50)])
def test_the_conntrack_tab_shows_victims_and_culprits_at_once(size: tuple[int, int]) -> None:
    feed = ListFeed(full_table())
    app = TopApp(feed, "live")

    async def steps(pilot: Pilot[int]) -> None:
        await press(pilot, "4")
        text = shown(app)
        assert cursor(app).startswith("> node worker-1")
        for words in ("100 %, 100,000 of 100,000 entries: FULL", "Read 3 s ago", "VICTIMS", "payments/api-0",
                      "ct-snat-port-clash", "CULPRITS", "shop/crawler-0", "81 %"):  # fmt: skip
            assert words in text
        assert text.count("insert failed 23") == 1
        beside = any("VICTIMS" in line and "CULPRITS" in line for line in screen(app))
        assert beside == (size[0] > 100)
        assert max(map(len, screen(app))) <= size[0]
        feed.snapshots.append(full_table(1409))
        await renew(pilot)
        assert "1,409" in cursor(app)
        assert "refused 1,409" in shown(app)
        await press(pilot, "j")
        assert cursor(app).startswith("> netns lab-web")
        assert "Nobody lost a packet by it." in shown(app)
        await press(pilot, "k", "enter")
        assert isinstance(app.screen, Reading)
        assert "Connection table of node worker-1" in shown(app)
        assert "payments/api-0" in shown(app)

    piloted(app, steps, size)


def test_the_conntrack_tab_sorts_and_says_that_a_filter_does_not_narrow_it() -> None:
    app = TopApp(ListFeed(full_table()), "live")

    async def steps(pilot: Pilot[int]) -> None:
        await press(pilot, "4")
        assert "USED▼" in shown(app)
        await press(pilot, "r")
        assert cursor(app).startswith("> netns lab-web")
        await press(pilot, "r", "greater_than_sign")
        assert "USED▼" not in shown(app).replace("REFUSED▼", "")
        assert "▼" in shown(app)
        await press(pilot, "slash", *"nosuch", "enter")
        assert "does not narrow this one" in shown(app)
        assert "shop/crawler-0" in shown(app)

    piloted(app, steps)


def test_a_tab_behind_is_drawn_with_the_newest_numbers_when_it_comes_to_the_front() -> None:
    feed = ListFeed(three(31, 29, 23))
    app = TopApp(feed, "live")

    async def steps(pilot: Pilot[int]) -> None:
        await press(pilot, "2", "1")
        feed.snapshots.append(three(1009, 29, 23))
        await renew(pilot)
        await press(pilot, "2")
        assert "1,061" in cursor(app)

    piloted(app, steps)


def test_zero_is_asked_of_the_feed_and_touches_nothing_else() -> None:
    feed = ListFeed(three(31, 29, 23))
    app = TopApp(feed, "live")

    async def steps(pilot: Pilot[int]) -> None:
        await press(pilot, "z")
        assert feed.zeroed == 1
        feed.snapshots.append(snapshot([]))
        await renew(pilot)
        assert "OK: no pod" in shown(app)

    piloted(app, steps)


def test_enter_unfolds_a_namespace_into_its_pods_and_escape_folds_it_again() -> None:
    app = TopApp(ListFeed(snapshot([*three(31, 29, 23).drops, drop(pod("bank", "x-0"), 7)])), "live")

    async def steps(pilot: Pilot[int]) -> None:
        await press(pilot, "2")
        assert cursor(app).split()[1:4] == ["shop", "3", "pods"]
        await press(pilot, "enter")
        assert "by workload" in screen(app)[2]
        assert "ns: shop" in screen(app)[2]
        assert "bank" not in shown(app)
        assert cursor(app).startswith("> shop/a-0")
        await press(pilot, "enter")
        assert "found by netns" in shown(app)
        await press(pilot, "escape", "escape")
        assert cursor(app).split()[1] == "shop"
        assert "bank" in shown(app)

    piloted(app, steps, (100, 24))


def test_sorting_and_reversing_by_keys_and_by_a_click_on_the_title() -> None:
    app = TopApp(ListFeed(three(31, 29, 23)), "live")

    async def steps(pilot: Pilot[int]) -> None:
        await press(pilot, "3", "r")
        assert cursor(app).startswith("> shop/c-0")
        await press(pilot, "r", "greater_than_sign")
        assert "RATE▼" in shown(app)
        await press(pilot, "less_than_sign")
        assert "PACKETS▼" in shown(app)
        await pilot.click("#drops-rows", offset=(3, 0))
        assert "OWNER▲" in shown(app)
        await pilot.click("#drops-rows", offset=(3, 3))
        assert cursor(app).startswith("> shop/c-0")

    piloted(app, steps)


def test_the_namespace_picker_narrows_every_tab() -> None:
    app = TopApp(ListFeed(snapshot([drop(pod("bank", "x-0"), 7), drop(pod("shop", "a-0"), 23)])), "live")

    async def steps(pilot: Pilot[int]) -> None:
        await press(pilot, "n", "down", "enter")
        assert "ns: bank" in screen(app)[2]
        assert "shop" not in shown(app)
        await press(pilot, "3")
        assert "shop/a-0" not in shown(app)
        await press(pilot, "escape")
        assert "shop/a-0" in shown(app)

    piloted(app, steps)


def test_details_help_and_explanation_open_and_close() -> None:
    asked: list[str] = []

    def explain(topic: str) -> str:
        asked.append(topic)
        return f"All about [b]{topic}[/b]."

    app = TopApp(ListFeed(three(31, 29, 23)), "live", explain=explain)

    async def steps(pilot: Pilot[int]) -> None:
        await press(pilot, "enter")
        for words in ("Who is hurt", "ss -lntup", "risk:", "undo:"):
            assert words in shown(app)
        await press(pilot, "e")
        assert "All about [b]closed-port[/b]." in shown(app)
        await press(pilot, "escape", "escape", "question_mark")
        assert "Choose a namespace" in shown(app)
        await press(pilot, "escape", "3", "e")
        assert asked == ["closed-port", "closed-port"]

    piloted(app, steps)


def test_every_key_has_an_entry_in_the_command_palette() -> None:
    app = TopApp(ListFeed(three(31, 29, 23)), "live")

    async def steps(_pilot: Pilot[int]) -> None:
        offered = {key for command in app.get_system_commands(app.screen) for key in command.help.split()}
        wanted = {"q", "?", "/", "Esc", "<", ">", "r", "t", "n", "Space", "z", "+", "-", "y", "P", "e", "a", *"123456"}
        assert wanted <= offered

    piloted(app, steps)


def test_the_fix_is_copied_to_the_terminals_clipboard() -> None:
    app = TopApp(ListFeed(three(31, 29, 23)), "live")

    async def steps(pilot: Pilot[int]) -> None:
        await press(pilot, "y")
        assert app.clipboard == "ss -lntup"

    piloted(app, steps)


def test_saving_writes_new_private_files_and_never_over_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    app = TopApp(ListFeed(three(31, 29, 23)), "live")

    async def steps(pilot: Pilot[int]) -> None:
        await press(pilot, "P")

    piloted(app, steps)
    (svg,) = tmp_path.glob("k8sdiag-worker-1-*.svg")
    (saved,) = tmp_path.glob("k8sdiag-worker-1-*.json")
    assert json.loads(saved.read_text())["total"]["packets"] == 83
    assert "shop" in svg.read_text()
    assert saved.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("size", [(60, 20), (80, 24), (200, 50), (40, 12)])
def test_any_size_shows_the_verdict_and_the_losses(size: tuple[int, int]) -> None:
    app = TopApp(ListFeed(snapshot([drop(pod("shop", "a-0"), 23)], lost=Lost(events=3))), "live")

    async def steps(pilot: Pilot[int]) -> None:
        assert "W shop" in shown(app)
        assert "23 packets" in shown(app)
        assert "LOST 3" in screen(app)[1]
        for key in "23456":
            await press(pilot, key)
            assert max(map(len, screen(app))) <= size[0]
        await pilot.resize_terminal(100, 30)
        await pilot.pause()
        await press(pilot, "3")
        assert cursor(app).startswith("> shop/a-0")

    piloted(app, steps, size)


def test_names_that_look_like_markup_are_shown_as_they_are() -> None:
    strange = pod("[red]", "x[/]y[@click=app.quit]z")
    app = TopApp(ListFeed(snapshot([drop(strange, 23, device="[b]")])), "replay [bold].k8sd")

    async def steps(pilot: Pilot[int]) -> None:
        assert "W [red]: nothing listens" in shown(app)
        assert "replay [bold].k8sd" in screen(app)[0]
        await press(pilot, "3")
        assert "[red]/x[/]y" in shown(app)
        await press(pilot, "enter")
        assert "[red]/x[/]y[@click=app.quit]z" in shown(app)
        await press(pilot, "escape", "y", "2", "t", "t", "n")
        assert "[red]" in shown(app)

    piloted(app, steps)


def test_five_hundred_rows_are_cut_to_two_hundred_and_a_key_still_answers_at_once() -> None:
    def many(step: int) -> Snapshot:
        rows = [drop(pod("shop", f"pod-{i}"), 1000 + (i * 7919 + step * 104729) % 5003) for i in range(500)]
        return snapshot(rows, t_ns=(60 + step) * 10**9)

    feed = ListFeed(many(0))
    app = TopApp(feed, "live")

    async def steps(pilot: Pilot[int]) -> None:
        await press(pilot, "3")
        assert "+300 more rows" in shown(app)
        spent_s = []
        for step in range(1, 6):
            feed.snapshots.append(many(step))
            begin_s = time.process_time()
            app.pull()
            spent_s.append(time.process_time() - begin_s)
            await pilot.pause()
        assert sorted(spent_s)[2] < 0.1
        await press(pilot, "G")
        assert app._list_tabs["drops"].rows._at == 199
        await press(pilot, "g")
        assert app._list_tabs["drops"].rows._at == 0

    piloted(app, steps)


def test_an_error_of_the_source_is_shown_over_what_was_counted_and_kept() -> None:
    feed = ListFeed(three(31, 29, 23))
    app = TopApp(feed, "replay x.k8sd")

    async def steps(pilot: Pilot[int]) -> None:
        feed.error = TraceError("x.k8sd is damaged at byte 4711: no zstd frame.")
        await renew(pilot)
        assert "damaged at byte 4711" in shown(app)
        await press(pilot, "escape")
        assert "STOPPED BY AN ERROR" in screen(app)[0]
        assert "83 packets" in shown(app)

    piloted(app, steps)


def test_a_missing_signal_is_named_and_not_zero() -> None:
    blind = snapshot([], capabilities=[Capability("drops", "missing", "", "lockdown=confidentiality")])
    app = TopApp(ListFeed(blind), "live")

    async def steps(pilot: Pilot[int]) -> None:
        assert "drops n/a" in screen(app)[1]
        assert "lockdown=confidentiality" in shown(app)
        await press(pilot, "3")
        assert "n/a: drops are not watched" in shown(app)

    piloted(app, steps)


class _Listed:
    """A source of batches; close() is noted and obeyed between two of them."""

    def __init__(self, batches: list[Batch], error: Exception | None = None) -> None:
        self.batches = batches
        self.error = error
        self.closed = threading.Event()

    def __iter__(self) -> Iterator[Batch]:
        yield from self.batches
        if self.error:
            raise self.error

    def close(self) -> None:
        self.closed.set()


class _Hanging(_Listed):
    def __iter__(self) -> Iterator[Batch]:
        yield from self.batches
        threading.Event().wait(30)


class _Counting:
    """An engine whose Snapshots say how many batches it has folded since it was zeroed."""

    def __init__(self) -> None:
        self.folded = self.built = 0

    def fold(self, batch: Batch) -> None:
        self.folded += 1

    def zero(self) -> None:
        self.folded = 0

    def snapshot(self) -> Snapshot:
        self.built += 1
        rows: list[DropRow] = [drop(Owner("host", "n"), self.folded)]
        return snapshot(rows)


def folded(feed: Feed) -> int:
    latest = feed.latest()
    assert latest is not None
    return latest.total.packets


def test_the_feed_keeps_the_latest_and_builds_no_more_than_one_snapshot_an_interval() -> None:
    engine = _Counting()
    feed = Feed(_Listed([Batch(i, ()) for i in range(1000)]), engine, interval_s=60)
    feed.start()
    feed._thread.join(5)
    assert feed.ended
    assert folded(feed) == 1000
    assert engine.built == 2


def test_the_feed_keeps_the_error_of_its_source_for_its_owner() -> None:
    error = TraceError("damaged at byte 7.")
    feed = Feed(_Listed([Batch(1, ())], error), _Counting())
    feed.start()
    assert feed.begun.wait(5)
    feed._thread.join(5)
    assert feed.error is error
    assert folded(feed) == 1


def test_stopping_the_feed_closes_the_source_and_takes_less_than_a_second_even_if_it_hangs() -> None:
    source = _Hanging([Batch(1, ())])
    feed = Feed(source, _Counting())
    feed.start()
    assert feed.begun.wait(5)
    begin_s = time.monotonic()
    assert feed.stop() is False
    assert time.monotonic() - begin_s < 1
    assert source.closed.is_set()


def test_zeroing_the_feed_starts_the_count_anew() -> None:
    gate = threading.Semaphore(0)

    class Gated(_Listed):
        def __iter__(self) -> Iterator[Batch]:
            for batch in self.batches:
                gate.acquire()
                yield batch

    feed = Feed(Gated([Batch(i, ()) for i in range(4)]), _Counting(), interval_s=0)
    feed.start()
    for _ in range(3):
        gate.release()
    deadline_s = time.monotonic() + 5
    while (feed.latest() is None or folded(feed) < 3) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert folded(feed) == 3
    feed.zero()
    gate.release()
    feed._thread.join(5)
    assert folded(feed) == 1


SCRIPT = """
import os, sys, threading
sys.path.insert(0, {root!r})
from k8sdiag.engine import Engine
from k8sdiag.errors import TraceError
from k8sdiag.facts import Capability, Node
from k8sdiag.source import Batch
from k8sdiag.tui.app import run

class Engine0(Engine):
    def zero(self):
        pass

class Source:
    def __iter__(self):
        if {mode!r} == "fails": raise TraceError("no such trace.")
        yield Batch(1, (Node("worker-1", "6.18", 1), Capability("drops", "full")))
        threading.Event().wait(30)
    def close(self): os.write(2, b"CLOSED")

try:
    code = run(Source(), Engine0(), "live", 0.2)
except TraceError as error:
    print("ERROR", error, file=sys.stderr)
    code = 1
sys.exit(code)
"""


def in_terminal(mode: str, leave: Callable[[int, int], None]) -> tuple[int, float, str]:
    """Runs the screen over a source that hangs, leaves it, and gives (exit code, seconds to end, what was written)."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(root=str(ROOT), mode=mode)],
        stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | {"TERM": "xterm"}, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    written = bytearray()

    def read() -> None:
        try:
            while chunk := os.read(ours, 1 << 16):
                written.extend(chunk)
        except OSError:
            return  # the other end is closed

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        deadline_s = time.monotonic() + 10
        while b"no pod" not in written and mode != "fails" and time.monotonic() < deadline_s:
            time.sleep(0.02)
        time.sleep(0.2)
        begin_s = time.monotonic()
        leave(process.pid, ours)
        code = process.wait(10)
        took_s = time.monotonic() - begin_s
        reader.join(2)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(ours)
    print(f"left after {took_s:.2f} s")
    return code, took_s, written.decode(errors="replace")


@pytest.mark.parametrize("way", ["q", "ctrl-c", "SIGTERM", "SIGINT", "SIGHUP"])
def test_every_way_out_closes_the_source_and_restores_the_terminal_while_the_source_hangs(way: str) -> None:
    def leave(pid: int, terminal: int) -> None:
        keys = {"q": b"q", "ctrl-c": b"\x03"}
        if way in keys:
            os.write(terminal, keys[way])
        else:
            os.kill(pid, signal.Signals[way])

    code, took_s, text = in_terminal("hangs", leave)
    assert code == 0
    assert took_s < 1
    assert "CLOSED" in text
    assert "\x1b[?1049l" in text
    assert "Traceback" not in text


def test_a_source_that_fails_at_once_raises_without_a_screen() -> None:
    code, _, text = in_terminal("fails", lambda _pid, _terminal: None)
    assert code == 1
    assert "ERROR no such trace." in text
    assert "\x1b[?1049h" not in text


def test_the_screen_pulls_in_no_heavy_library() -> None:
    heavy = ["markdown_it", "pygments", "tree_sitter", "bcc", "pyroute2", "psutil"]
    found = subprocess.run(
        [sys.executable, "-c", f"import sys; import k8sdiag.tui.app; print([m for m in {heavy} if m in sys.modules])"],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    assert found.stdout.strip() == "[]"
