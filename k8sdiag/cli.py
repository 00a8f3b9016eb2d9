"""The command line: verbs, their options, and the one place where errors become exit codes.

Nothing but argparse is imported up here: each verb fetches what it needs, so that --help answers at once and the
verbs that read traces work where bcc, root and Linux are absent.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from k8sdiag import __version__
from k8sdiag.errors import K8sdiagError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from k8sdiag.engine import Engine
    from k8sdiag.report import Check
    from k8sdiag.snapshot import Owner, Snapshot
    from k8sdiag.source import Source
    from k8sdiag.trace import TraceSource

OVERVIEW = """\
Who loses packets on this Kubernetes node, where in the kernel, and why.

Live:      top      watch, on a screen              check    one shot, for scripts and monitoring
           pods     who is who on this node
Incident:  record   write a trace file              replay   look at one, on any machine
Learn:     doctor   what can be seen here           explain  what a cause, reason or field means
           demo     a small lab with faults, to see all this without a cluster

Examples:  sudo k8sdiag top
           sudo k8sdiag check --duration 10s -o json
           sudo k8sdiag record -w incident.k8sd --duration 60s;  k8sdiag replay incident.k8sd
"""
EXIT_CODES = """\
exit codes of check: 0 healthy, 1 a warning, 2 critical, 3 could not tell, usage error or not permitted
                     (--for simple: 0 healthy or warning, 1 critical, 3 could not tell)
others: 0 done, 1 failed, 2 usage error"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb. Returns the exit code; every error has become a message on stderr by then."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Monitoring systems read 1 and 2 of check as verdicts: what is none must not look like one.
    failure = 3 if "check" in words else 0
    options = argparse.Namespace(verbose=False)
    signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a sign that this terminal lacks is no reason to stop
    try:
        options = _parser(failure or 2).parse_args(words)
        if not options.verb:
            _parser(2).print_help()
            return 0
        failure = 3 if options.verb == "check" else 0
        run: Callable[[argparse.Namespace], int] = options.run
        code = run(options)
        sys.stdout.flush()
    except K8sdiagError as error:
        return _failed(str(error), options, failure or error.exit_code)
    except BrokenPipeError:
        # The reader has seen enough. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except KeyboardInterrupt:
        return failure
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return _failed(f"{error.strerror or error}{where}", options, failure or 1)
    except Exception as error:  # noqa: BLE001 -- a fault of ours: said as such, with the right exit code
        options.verbose = True
        return _failed(f"internal error: {error!r}; please report this", options, failure or 1)
    return code


def _failed(message: str, options: argparse.Namespace, code: int) -> int:
    if options.verbose:
        import traceback

        traceback.print_exc()
    print(f"k8sdiag: {message}", file=sys.stderr)
    return code


def _terminate(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


class _Parser(argparse.ArgumentParser):
    """Says how it is used in one line, and exits with the code for that."""

    usage_code = 2

    def error(self, message: str) -> None:  # type: ignore[override]
        self.print_usage(sys.stderr)
        self.exit(self.usage_code, f"{self.prog}: {message}\n")


def _parser(usage_code: int) -> _Parser:
    _Parser.usage_code = usage_code
    formatter = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        "k8sdiag", description=OVERVIEW, epilog=EXIT_CODES, formatter_class=formatter, usage="k8sdiag VERB [options]"
    )
    parser.add_argument("--version", action="version", version=f"k8sdiag {__version__}")
    parser.set_defaults(verb=None, verbose=False)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", help=argparse.SUPPRESS, prog="k8sdiag")

    common = _Parser(add_help=False)
    common.add_argument("-v", "--verbose", action="store_true", help="add a traceback to errors")
    narrow = _Parser(add_help=False)
    narrow.add_argument(
        "-n",
        "--namespace",
        action="append",
        default=[],
        metavar="NS",
        help="only this Kubernetes namespace (repeatable)",
    )
    narrow.add_argument("--pod", metavar="GLOB", help="only pods whose name matches")
    narrow.add_argument("--all-drops", action="store_true", help="show benign drops too")
    live = _Parser(add_help=False)
    live.add_argument(
        "--interval", type=duration_s, default=1.0, metavar="1s", help="how often to read the counts (default 1s)"
    )
    live.add_argument(
        "--host-root", default="/", metavar="DIR", help="where the host's files are, seen from a container"
    )

    def verb(name: str, run: Callable[[argparse.Namespace], int], text: str, *parents: _Parser) -> _Parser:
        added = verbs.add_parser(name, description=text, parents=[common, *parents], formatter_class=formatter)
        added.set_defaults(run=run)
        return added

    top = verb("top", _top, "Watch this node.", narrow, live)
    top.add_argument("--once", action="store_true", help="print one frame as text and exit")
    top.add_argument(
        "--duration",
        type=duration_s,
        default=None,
        metavar="TIME",
        help="end by itself; with --once: how long to watch before the frame (default 3s)",
    )

    check = verb(
        "check", _check, "Watch for a while and judge, or judge a recorded trace.\n\n" + EXIT_CODES, narrow, live
    )
    check.add_argument(
        "trace", nargs="?", metavar="TRACE", help="a recorded trace: its worst window of --duration is judged"
    )
    check.add_argument(
        "--duration", type=duration_s, default=10.0, metavar="10s", help="how long to watch (default 10s)"
    )
    check.add_argument("--whole", action="store_true", help="judge all of TRACE as one window")
    check.add_argument("-o", "--output", choices=("table", "wide", "json"), default="table")
    check.add_argument(
        "--for", dest="style", choices=("nagios", "simple"), default="nagios", help="meaning of the exit code"
    )
    check.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="CAUSE[@NS[/WORKLOAD]]",
        help="expected: does not change the status (repeatable)",
    )
    check.add_argument(
        "--limit", type=int, default=1000, metavar="ROWS", help="rows of drops (default 1000); the rest is summed"
    )

    pods = verb("pods", _pods, "Network namespaces of this node, whose they are, and how that is known.", live)
    pods.add_argument("-o", "--output", choices=("table", "wide", "json"), default="table")

    record = verb("record", _record, "Write what happens to a trace file.", live)
    record.add_argument(
        "-w", "--write", metavar="FILE", help="where to (default k8sdiag-NODE-UTCTIME.k8sd; - is stdout)"
    )
    record.add_argument(
        "--duration", type=duration_s, default=None, metavar="60s", help="how long (default: until Ctrl-C)"
    )
    record.add_argument(
        "--samples",
        type=_samples,
        default=50,
        metavar="50/s",
        help="sampled packets per second, headers only (default 50/s)",
    )

    replay = verb("replay", _replay, "The screen of top over a recorded trace.", narrow)
    replay.add_argument("trace", metavar="TRACE")
    replay.add_argument("--once", action="store_true", help="print the state at the end as text and exit")
    replay.add_argument("--speed", type=float, default=1.0, metavar="X", help="how many times faster than it happened")

    doctor = verb("doctor", _doctor, "What can be seen on this node, what cannot, and what to do about it.")
    doctor.add_argument("-o", "--output", choices=("table", "json"), default="table")
    doctor.add_argument("--host-root", default="/", metavar="DIR", help="where the host's files are")

    explain = verb("explain", _explain, "What a cause, a drop reason or a field of the JSON means.")
    explain.add_argument("topic", nargs="?")
    explain.add_argument("--list", action="store_true", help="all causes")
    explain.add_argument(
        "--severities", action="store_true", help="from which rate on a cause is a warning or critical"
    )
    explain.add_argument("--fields", action="store_true", help="all fields of the JSON")

    demo = verb("demo", _demo, "Build a lab of network namespaces, break it, and open top on it.")
    demo.add_argument("--once", action="store_true", help="print one frame as text and exit")
    return parser


_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def duration_s(text: str) -> float:
    """Seconds of "500ms", "10s", "5m", "1h" or a bare number of seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h)?", text.strip())
    if not match or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration: write 500ms, 10s, 5m or 1h")
    return float(match[1]) * _UNITS[match[2] or "s"]


def _samples(text: str) -> int:
    match = re.fullmatch(r"(\d+)(?:/s)?", text.strip())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no rate: write 50/s")
    return int(match[1])


def _live_source(options: argparse.Namespace, duration: float | None, samples_per_s: int = 50) -> Source:
    if not sys.platform.startswith("linux"):
        raise K8sdiagError("Watching needs Linux; traces can be read here: replay FILE, check FILE.")

    from k8sdiag.host.bpf import Compilation, require_permission
    from k8sdiag.host.symbols import KernelSymbols

    root = _host_root(options)
    require_permission()
    # Compiling takes longest: it goes on in a process of its own while the rest is imported here.
    compilation = Compilation("drops").begin(KernelSymbols())
    from k8sdiag.host.live import LiveSource

    return LiveSource(options.interval, duration, samples_per_s, root, compilation)


def _host_root(options: argparse.Namespace) -> Path:
    from pathlib import Path

    root = Path(options.host_root)
    if not (root / "proc/self").exists():
        raise UsageError(f"--host-root {root}: there is no /proc below it. It takes where the host's / is mounted.")
    return root


def _engine(options: argparse.Namespace, window_s: float | None = None, row_limit: int = 500) -> Engine:
    from k8sdiag.engine import Engine

    asked = [f"namespace {name}" for name in options.namespace] + ([f"pods {options.pod}"] if options.pod else [])
    return Engine(window_s, row_limit, _ignored(getattr(options, "ignore", [])), _narrowed(options), ", ".join(asked))


def _narrowed(options: argparse.Namespace) -> Callable[[Owner], bool] | None:
    """Who is in the namespaces and matches the glob asked for."""
    if not options.namespace and not options.pod:
        return None
    from fnmatch import fnmatchcase

    return lambda owner: (
        (not options.namespace or owner.namespace in options.namespace)
        and (not options.pod or fnmatchcase(owner.name, options.pod))
    )


def _ignored(expressions: Sequence[str]) -> Callable[[str, Owner], bool]:
    from k8sdiag.causes import BY_SLUG

    wanted: list[tuple[str, str, str]] = []
    for expression in expressions:
        cause, _, where = expression.partition("@")
        namespace, _, workload = where.partition("/")
        if cause not in BY_SLUG:
            raise UsageError(f"--ignore {expression}: there is no cause {cause!r}; `k8sdiag explain --list` names all.")
        wanted.append((cause, namespace, workload))

    def ignored(slug: str, owner: Owner) -> bool:
        return any(
            slug == cause
            and (not namespace or owner.namespace == namespace)
            and (not workload or (owner.workload or "").rpartition("/")[2] == workload or owner.workload == workload)
            for cause, namespace, workload in wanted
        )

    return ignored


def _print(lines: Sequence[str]) -> None:
    for line in lines:
        print(line)


def _width() -> int:
    """Of the terminal, or $COLUMNS, or 100 where the output goes elsewhere."""
    import shutil

    return shutil.get_terminal_size((80 if sys.stdout.isatty() else 100, 24)).columns


def _in_colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


@contextmanager
def _ended_by_signals(source: Source) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the source, which reads the counts once more; a second one ends the program."""

    def end(number: int, _frame: object) -> None:
        source.close()
        signal.signal(number, _terminate)

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run_through(source: Source, engine: Engine) -> Snapshot:
    """Fold all of a source; Ctrl-C ends it early, with what was counted until then."""
    with _ended_by_signals(source):
        for batch in source:
            engine.fold(batch)
    return engine.snapshot()


def _top(options: argparse.Namespace) -> int:
    if not options.once:
        _require_terminal()
        return _screen(options, _live_source(options, options.duration), "live")
    duration = options.duration or 3.0
    options.interval = min(options.interval, duration)
    source = _live_source(options, duration)
    _print_once(options, _run_through(source, _engine(options)))
    return 0


def _print_once(options: argparse.Namespace, snapshot: Snapshot) -> None:
    from k8sdiag import views

    _print(views.once(snapshot, _width(), _in_colour(), all_drops=options.all_drops))


WINDOW_S = 60.0
"""What `top` looks back on."""


def _screen(options: argparse.Namespace, source: Source, mode: str) -> int:
    from k8sdiag import report
    from k8sdiag.explain import text
    from k8sdiag.tui.app import run
    from k8sdiag.views import ViewState

    filtered = bool(options.namespace or options.pod)
    return run(
        source,
        _engine(options, WINDOW_S),
        mode,
        getattr(options, "interval", 1.0),
        explain=lambda topic: text(topic, 78),
        as_json=lambda snapshot: report.as_json(report.check(snapshot, filtered=filtered)),
        state=ViewState(all_drops=options.all_drops),
        end_with_source=getattr(options, "duration", None) is not None,
    )


def _require_terminal() -> None:
    if not sys.stdout.isatty():
        raise UsageError("The screen needs a terminal; for pipes and scripts: --once, or `k8sdiag check`.")


def _check(options: argparse.Namespace) -> int:
    if options.trace:
        snapshot = _worst(options)
    else:
        options.interval = min(options.interval, options.duration)
        source = _live_source(options, options.duration)
        snapshot = _run_through(source, _engine(options, row_limit=options.limit))
    from k8sdiag import report, views

    result = report.check(snapshot, filtered=bool(options.namespace or options.pod))
    if options.output == "json":
        sys.stdout.write(report.as_json(result).decode())
    else:
        _print(_verdict_lines(snapshot, result, options.trace))
        width = 200 if options.output == "wide" else _width()
        _print(views.once(snapshot, width, _in_colour(), all_drops=options.all_drops))
    return report.EXIT_CODES[options.style][result.status]


def _verdict_lines(snapshot: Snapshot, result: Check, trace: str | None) -> list[str]:
    from k8sdiag import report

    line = f"k8sdiag {result.status.upper()}"
    if trace:
        line += f": {trace}, {result.window.duration_s:g} s from {result.window.start}"
    if result.status == "unknown":
        line += f": {report.why_unknown(snapshot)}"
    return [line]


def _worst(options: argparse.Namespace) -> Snapshot:
    """The worst whole window of --duration in a trace, or all of it, also where it is shorter."""
    from k8sdiag import report

    source = _trace_source(options.trace)
    engine = _engine(options, None if options.whole else options.duration, options.limit)
    worst: Snapshot | None = None
    worst_rank = (-1, -1)
    for batch in source:
        engine.fold(batch)
        if options.whole or engine.seconds < options.duration:
            continue
        snapshot = engine.snapshot()
        rank = ("ok", "warning", "unknown", "critical").index(report.status(snapshot)), snapshot.total.packets
        if rank >= worst_rank:
            worst, worst_rank = snapshot, rank
    _warn(source)
    return engine.snapshot() if worst is None else worst


def _trace_source(path: str) -> TraceSource:
    from k8sdiag.trace import TraceSource

    return TraceSource.open(path)


def _warn(source: TraceSource) -> None:
    if source.warning:
        print(f"k8sdiag: {source.warning}", file=sys.stderr)


def _pods(options: argparse.Namespace) -> int:

    from k8sdiag import views
    from k8sdiag.host.bpf import require_permission
    from k8sdiag.host.inventory import Inventory
    from k8sdiag.host.live import node_fact
    from k8sdiag.identity import Identity

    require_permission()
    inventory, identity = Inventory(_host_root(options)), Identity()
    t_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    for fact in (node_fact(inventory), *inventory.facts(t_ns)):
        identity.fold(fact)
    rows = identity.residents(t_ns)
    if options.output == "json":
        import msgspec

        sys.stdout.write(msgspec.json.format(msgspec.json.encode(rows), indent=2).decode() + "\n")
    else:
        _print(views.pods(rows, 200 if options.output == "wide" else _width()))
    return 0


def _record(options: argparse.Namespace) -> int:
    source = _live_source(options, options.duration, options.samples)
    import platform
    from datetime import datetime, timezone

    from k8sdiag.facts import Drops
    from k8sdiag.trace import SUFFIX, TraceWriter, create

    moment = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    path = options.write or f"k8sdiag-{platform.node()}-{moment}{SUFFIX}"
    writer: TraceWriter | None = None
    packets = 0
    try:
        with _ended_by_signals(source):
            for batch in source:
                if writer is None:  # the probe is attached: only now is there something to write
                    writer = TraceWriter(create(path, is_new=not options.write))
                    if path != "-":
                        print(f"k8sdiag: recording to {path}, Ctrl-C ends it", file=sys.stderr)
                writer.write(batch)
                packets += sum(sum(fact.packets) for fact in batch.facts if isinstance(fact, Drops))
    except OSError as error:
        if isinstance(error, BrokenPipeError) or writer is None:
            raise
        raise K8sdiagError(
            f"Cannot write {path}: {error.strerror}. The {writer.bytes_written} bytes written before can be read."
        ) from error
    finally:
        if writer is not None:
            with suppress(OSError):  # what could not be written has been said
                writer.close()
    if writer is not None and path != "-":
        print(f"k8sdiag: {path}: {writer.bytes_written} bytes, {packets} dropped packets", file=sys.stderr)
    return 0


def _replay(options: argparse.Namespace) -> int:
    from k8sdiag.source import Paced

    source = _trace_source(options.trace)
    if options.once:
        snapshot = _run_through(source, _engine(options))
        _warn(source)
        _print_once(options, snapshot)
        return 0
    if options.speed <= 0:
        raise UsageError("--speed takes a number above 0.")
    _require_terminal()
    return _screen(options, Paced(source, options.speed), f"replay {options.trace}")


def _doctor(options: argparse.Namespace) -> int:

    from k8sdiag import report
    from k8sdiag.host import doctor

    result = doctor.examine(_host_root(options))
    if options.output == "json":
        sys.stdout.write(report.as_json(result).decode())
    else:
        _print(doctor.text(result, _width()))
    return result.exit_code


def _explain(options: argparse.Namespace) -> int:
    from k8sdiag import explain

    if options.list:
        print(explain.listing())
    elif options.severities:
        print(explain.severities())
    elif options.fields:
        print(explain.fields())
    elif options.topic:
        print(explain.text(options.topic, _width()))
    else:
        raise UsageError(
            "What shall be explained? A cause, a drop reason or a field; --list, --severities, --fields list them."
        )
    return 0


def _demo(options: argparse.Namespace) -> int:
    from k8sdiag.host.bpf import require_permission
    from k8sdiag.host.demo import Demo

    require_permission()
    with Demo():
        options.namespace, options.pod, options.all_drops = [], None, False
        options.interval, options.host_root, options.duration = 1.0, "/", None
        return _top(options)
