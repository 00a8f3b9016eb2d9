"""Why packets are dropped: the catalogue of causes, and the findings drawn from one window.

Each cause says which drops it claims, in the order of ALL: the first that claims a drop is its cause. A finding
gathers what one cause did to one Kubernetes namespace (or to one owner outside Kubernetes), with the numbers that
prove it and the change that mends it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from k8sdiag.causes import conntrack, node, policy, routing, sockets
from k8sdiag.causes.benign import BENIGN, is_benign
from k8sdiag.causes.cause import Case, Cause, Connections, Drop, Severities, Window
from k8sdiag.causes.conntrack import UNDECIDED_PORT, asked_of, decide
from k8sdiag.facts import Confidence
from k8sdiag.snapshot import ConntrackRow, DropRow, Evidence, Finding, Owner

__all__ = [
    "ALL",
    "BENIGN",
    "BY_SLUG",
    "UNDECIDED_PORT",
    "UNEXPLAINED",
    "Case",
    "Cause",
    "Connections",
    "Drop",
    "Severities",
    "Window",
    "asked_of",
    "cause_of",
    "confidence_of",
    "decide",
    "findings",
]

UNEXPLAINED = Cause(
    slug="unexplained",
    title="packets dropped for a reason outside the catalogue",
    severities=Severities(1.0, 100.0, 10),
    claims=lambda _: True,
    feels="Depends on the reason and the function named with it.",
    proof="The kernel's own drop reason and the function that dropped.",
    ruled_out=(),
    fix=lambda _: (),
    confidence="possible",
)
ALL: tuple[Cause, ...] = (
    *conntrack.CAUSES,
    *node.CAUSES,
    *policy.CAUSES,
    *routing.CAUSES,
    *sockets.CAUSES,
    UNEXPLAINED,
)
BY_SLUG: dict[str, Cause] = {cause.slug: cause for cause in ALL}


_SEVERITIES = ("critical", "warning", "info")
_CONFIDENCES: tuple[Confidence, ...] = ("possible", "likely", "proven")


def cause_of(drop: Drop) -> str:
    """Slug of the cause of a drop, BENIGN, or what only decide() can make one of these from."""
    if is_benign(drop):
        return BENIGN
    return conntrack.undecided(drop) or next(cause.slug for cause in ALL if cause.claims(drop))


def confidence_of(slug: str, first: str, verdict: str, *, probed: bool = False, reason: int | str = "") -> Confidence:
    """How sure it is that `slug` is the cause of a drop.

    `first` is what cause_of() said of it, before decide(); verdict and probed are those of facts.DropKey; reason is
    the kernel's, by number or name, falsy where it gives none.
    """
    if slug == BENIGN:
        return "proven"
    told: Confidence
    if first not in (slug, conntrack.UNDECIDED_PORT) and slug in conntrack.SLUGS:
        told = "possible"  # the window's statistics decided, not those at the packet
    elif verdict == "INSERT_FAILED":
        told = "likely" if probed else "possible"  # an entry that was being deleted clashed with nothing
    elif slug in conntrack.SLUGS and verdict:
        told = "proven" if probed else "likely"
    else:
        told = "proven" if reason else "likely"
    return min(told, BY_SLUG[slug].confidence, key=_CONFIDENCES.index)


def findings(window: Window, ignored: Callable[[str, Owner], bool] = lambda _slug, _owner: False) -> list[Finding]:
    """Everything that is wrong in a window, worst first."""
    groups: dict[tuple[str, object], list[DropRow]] = {}
    for row in window.drops:
        if not row.benign:
            groups.setdefault((row.cause, row.owner.group), []).append(row)
    found = [_finding(BY_SLUG[slug], rows, window, ignored) for (slug, _), rows in groups.items()]
    for (slug, group), tables in _noticed(window).items():
        if (slug, group) not in groups:
            found.append(_finding_without_drops(BY_SLUG[slug], tables, window, ignored))

    def rank(finding: Finding) -> tuple[bool, int, int, str, str]:
        severity = _SEVERITIES.index(finding.severity)
        return finding.ignored, severity, -finding.packets, finding.cause, finding.victims[0].label

    return sorted(found, key=rank)


def _noticed(window: Window) -> dict[tuple[str, object], list[ConntrackRow]]:
    """Tables whose statistics are a finding, by slug and group of their owners."""
    found: dict[tuple[str, object], list[ConntrackRow]] = {}
    for cause in ALL:
        for table in window.tables:
            if cause.notices(table, window.seconds) is not None:
                found.setdefault((cause.slug, table.owner.group), []).append(table)
    return found


def _finding(cause: Cause, rows: Sequence[DropRow], window: Window, ignored: Callable[[str, Owner], bool]) -> Finding:
    packets = sum(row.packets for row in rows)
    per_owner: dict[tuple[str, str | None, str, str | None], tuple[Owner, int]] = {}
    for row in rows:
        owner, sum_ = per_owner.get(row.owner.identity, (row.owner, 0))
        per_owner[row.owner.identity] = owner, sum_ + row.packets
    victims = sorted(per_owner.values(), key=lambda pair: (-pair[1], pair[0].label))
    case = Case(rows, window.tables, window.seconds)
    told = all((row.verdict or "unknown") != "unknown" for row in rows)
    return Finding(
        cause=cause.slug,
        severity=cause.severities.judge(packets, window.seconds),
        confidence=_confidence(cause, case),
        ignored=all(ignored(cause.slug, owner) for owner, _ in victims),
        title=cause.title,
        victims=tuple(owner for owner, _ in victims),
        culprits=cause.culprits(case),
        packets=packets,
        connections=window.connections(rows),
        evidence=(*_places(case, packets), *cause.evidence(case), *_victims(victims)),
        fix=cause.fix(case),
        ruled_out=cause.ruled_out + (cause.ruled_out_by_verdict if told else ()),
    )


def _finding_without_drops(
    cause: Cause, tables: Sequence[ConntrackRow], window: Window, ignored: Callable[[str, Owner], bool]
) -> Finding:
    noticed = [one for table in tables if (one := cause.notices(table, window.seconds)) is not None]
    worst = min(noticed, key=lambda one: _SEVERITIES.index(one.severity))
    concerned = [owner for one in noticed for owner in one.concerned]
    victims = {owner.identity: owner for owner in concerned or [table.owner for table in tables]}.values()
    case = Case((), tables, window.seconds)
    return Finding(
        cause=cause.slug,
        severity=worst.severity,
        confidence="proven" if concerned else "likely",  # counters alone name no packet
        ignored=all(ignored(cause.slug, owner) for owner in victims),
        title=worst.title,
        victims=tuple(victims),
        culprits=cause.culprits(case),
        packets=0,
        connections=None,
        evidence=tuple(cause.evidence(case)),
        fix=cause.fix(case),
        ruled_out=cause.ruled_out,
    )


def _confidence(cause: Cause, case: Case) -> Confidence:
    """That of most packets, and no more than what the cause and its doubts allow."""
    packets = dict.fromkeys(_CONFIDENCES, 0)
    for row in case.rows:
        packets[row.confidence] += row.packets
    most = max(_CONFIDENCES, key=lambda one: packets[one])  # of as many, the weakest
    if cause.is_doubtful(case):
        return "possible"
    return min(most, cause.confidence, key=_CONFIDENCES.index)


def _places(case: Case, packets: int) -> Iterable[Evidence]:
    places: dict[tuple[str, str, str | None], int] = {}
    for row in case.rows:
        place = row.reason, row.location, row.hook
        places[place] = places.get(place, 0) + row.packets
    for (reason, location, hook), count in sorted(places.items(), key=lambda item: -item[1])[:3]:
        at = f"{location} ({hook})" if hook else location
        yield Evidence(f"{reason or 'drop'} at {at}", count, "packets", "skb:kfree_skb")
    yield Evidence("rate", round(packets / max(case.seconds, 1e-9), 2), "packets/s", "skb:kfree_skb")


def _victims(victims: Sequence[tuple[Owner, int]]) -> Iterable[Evidence]:
    for owner, packets in victims[:5]:
        yield Evidence(f"dropped for {owner.label}", packets, "packets", f"attributed by {owner.how}")
