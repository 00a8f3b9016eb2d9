"""How numbers with their units, owners and packets are said: one place, so that a rate reads the same everywhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from k8sdiag.facts import Confidence
from k8sdiag.snapshot import CauseCount, DropRow, Owner

NOT_AVAILABLE = "n/a"
RATE_WINDOW = "5 s"
"""What "now" means in a rate: engine.RATE_NS."""

LEAST = 0.05
"""With one decimal, what is less would be rounded to 0.0, and 0 is "none"."""
MINUTE_S, HOUR_S = 60, 3600


def number(value: int | None) -> str:
    """A count with separators. None is what was not measured."""
    return NOT_AVAILABLE if value is None else f"{value:,}"


def rate(pps: float | None) -> str:
    """A rate per second: 0/s, <0.1/s, 12.3/s, 1.2k/s, 3.4M/s."""
    if pps is None:
        return NOT_AVAILABLE
    if 0 < pps < LEAST:
        return "<0.1/s"
    return f"{_scaled(pps)}/s" if pps else "0/s"


def _scaled(value: float) -> str:
    power = 0
    while round(value, 1) >= 1000 and power < 4:  # noqa: PLR2004
        value /= 1000
        power += 1
    return f"{value:.1f}{('', 'k', 'M', 'G', 'T')[power]}"


def growth(per_s: float) -> str:
    """A signed rate: +1.2k/s, -3.0/s, 0/s."""
    return ("+" if per_s > 0 else "-" if per_s < 0 else "") + rate(abs(per_s))


def percent(part: int | None, whole: int | None) -> str:
    """A share; what is a part is rounded neither to nothing nor to the whole."""
    if part is None or not whole:
        return NOT_AVAILABLE
    if part >= whole or not part:
        return f"{100 * part // whole} %"
    return f"{min(round(100 * part / whole), 99)} %" if 100 * part >= whole else "<1 %"


def duration(seconds: float) -> str:
    """0.4 s, 12 s, 3 min 20 s, 5 h 04 min."""
    whole = round(seconds)
    if whole < MINUTE_S:
        return f"{seconds:.1f} s" if LEAST <= seconds < 1 else f"{whole} s"
    minutes, rest = divmod(whole, MINUTE_S)
    if whole < HOUR_S:
        return f"{minutes} min {rest:02d} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: int | None) -> str:
    """Bytes in binary units."""
    if count is None:
        return NOT_AVAILABLE
    if count < 1 << 10:
        return f"{count} bytes"
    power = min((count.bit_length() - 1) // 10, 3)
    return f"{count / (1 << 10 * power):.1f} {('', 'KiB', 'MiB', 'GiB')[power]}"


def plural(count: int | None, one: str) -> str:
    """29 packets, 1 packet; "connections n/a" for what was not measured."""
    if count is None:
        return f"{one}s {NOT_AVAILABLE}"
    return f"{number(count)} {one}{'' if count == 1 else 's'}"


def owner_words(owner: Owner, *, namespace_only: bool = False) -> str:
    """An owner with the word for what it is."""
    if owner.namespace:
        return owner.namespace if namespace_only else owner.label
    word = {"host": "node", "external": "", "unknown": "unknown owner,", "pod": "pod"}.get(owner.kind, owner.kind)
    return f"{word} {owner.name}".strip()


def cause_words(counts: Sequence[CauseCount]) -> str:
    """Causes with their packets, most first; a single one needs no number."""
    if not counts:
        return "-"
    if len(counts) == 1:
        return counts[0].cause
    return ", ".join(f"{count.cause} {number(count.packets)}" for count in counts)


ARROWS, ASCII_ARROWS = ("←", "→", "↔"), ("<-", "->", "--")


def ends(row: DropRow, arrows: tuple[str, str, str] = ARROWS) -> str:
    """Owner and peer, with the way the packet went: arrows are (to the owner, from it, past it)."""
    return f"{row.owner.label} {peer_words(row, arrows)}" if row.peer else row.owner.label


def peer_words(row: DropRow, arrows: tuple[str, str, str] = ARROWS) -> str:
    if row.peer is None:
        return "-"
    arrow = arrows[0] if row.direction == "in" else arrows[1] if row.direction == "out" else arrows[2]
    return f"{arrow} {row.peer.label}"


def place(row: DropRow) -> str:
    """Where in the kernel: function, hook, device."""
    text = row.location
    if row.hook:
        text += f", hook {row.hook}"
    if row.conntrack:
        text += f", conntrack {row.conntrack}"
    return text


def flow(row: DropRow, arrows: tuple[str, str] = ("->", "<->")) -> str:
    """Protocol, addresses and ports, as far as they were kept; of a translated connection the way back too."""
    parts = [row.protocol or "not IP"]
    if row.src or row.dst:
        parts.append(both_ways(row, endpoint(row.src, row.sport), endpoint(row.dst, row.dport), arrows))
    elif row.family:
        parts.append("addresses folded")
    if row.device:
        parts.append(f"on {row.device}")
    return " ".join(parts)


def named_flow(row: DropRow) -> str:
    """As flow(), of a translated connection, with the owner and the service by their names; empty for others."""
    if row.reply is None or not row.src or not row.dst:
        return ""
    src = row.owner.name if row.direction == "out" else row.src
    to = endpoint(row.owner.name if row.direction == "in" else row.dst, row.dport)
    return both_ways(row, endpoint(src, row.sport), row.service or to, ("→", "⇄"))


def both_ways(row: DropRow, src: str, dst: str, arrows: tuple[str, str]) -> str:
    text = f"{src} {arrows[0]} {dst}"
    if row.reply is None:
        return text
    back = row.reply
    return f"{text} {arrows[1]} {endpoint(back.src, back.sport)} {arrows[0]} {endpoint(back.dst, back.dport)}"


def endpoint(host: str | None, port: int | None) -> str:
    """address:port; without a port where that differs between the packets."""
    host = host or "?"
    if not port:
        return host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


NATS = {"src": "source", "dst": "destination", "both": "source and destination"}
VERDICTS = {
    "rule": "a rule dropped it; conntrack counted nothing",
    "refused": "conntrack allocated no entry for it: the table is full, or a tracker refused it",
    "clash": "its entry met one that was there already, and could not be inserted",
    "chain_too_long": "the hash chain its entry belongs to was too long",
    "insert_failed": "its entry was not inserted although nothing clashed: it was dying",
    "unknown": "whether conntrack or a rule dropped it could not be told at the drop",
}
CONFIDENCES: dict[Confidence, str] = {
    "proven": "proven: seen in the function that refused it",
    "likely": "likely: told from the statistics of conntrack, read at the drop",
    "possible": "possible: several causes fit, and statistics decided",
}


def verdict_words(row: DropRow) -> str:
    """What conntrack had to do with a drop, and how sure that is; empty where nothing was asked."""
    if not row.verdict:
        return ""
    said = VERDICTS.get(row.verdict.lower(), row.verdict)
    if row.verdict.lower() == "unknown":
        return f"{said}: {CONFIDENCES['possible']}"
    # A rule is seen by what did not happen: no function refused anything.
    return said if row.verdict.lower() == "rule" else f"{said} ({CONFIDENCES[row.confidence]})"


def total(values: Iterable[int | None]) -> int | None:
    """None as soon as one part is not known."""
    known = list(values)
    return None if None in known else sum(value for value in known if value is not None)
