"""Why packets are dropped: the catalogue of causes, and the findings drawn from one window.

Each cause says which drops it claims, in the order of ALL: the first that claims a drop is its cause. A finding
gathers what one cause did to one Kubernetes namespace (or to one owner outside Kubernetes), with the numbers that
prove it and the change that mends it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from k8sdiag.causes import node, policy, routing, sockets
from k8sdiag.causes.benign import is_benign
from k8sdiag.causes.cause import Cause, Connections, Drop, Severities, Window
from k8sdiag.snapshot import DropRow, Evidence, Finding, Owner

__all__ = [
    "ALL",
    "BENIGN",
    "BY_SLUG",
    "UNEXPLAINED",
    "Cause",
    "Connections",
    "Drop",
    "Severities",
    "Window",
    "cause_of",
    "findings",
]

BENIGN = "benign"
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
ALL: tuple[Cause, ...] = (*node.CAUSES, *policy.CAUSES, *routing.CAUSES, *sockets.CAUSES, UNEXPLAINED)
BY_SLUG: dict[str, Cause] = {cause.slug: cause for cause in ALL}


def cause_of(drop: Drop) -> str:
    """Slug of the cause of a drop, or BENIGN."""
    if is_benign(drop):
        return BENIGN
    return next(cause.slug for cause in ALL if cause.claims(drop))


def findings(window: Window, ignored: Callable[[str, Owner], bool] = lambda _slug, _owner: False) -> list[Finding]:
    """Everything that is wrong in a window, worst first."""
    groups: dict[tuple[str, object], list[DropRow]] = {}
    for row in window.drops:
        if not row.benign:
            groups.setdefault((row.cause, row.owner.group), []).append(row)
    found = [_finding(BY_SLUG[slug], rows, window, ignored) for (slug, _), rows in groups.items()]
    order = ("critical", "warning", "info")

    def rank(finding: Finding) -> tuple[bool, int, int, str, str]:
        severity = order.index(finding.severity)
        return finding.ignored, severity, -finding.packets, finding.cause, finding.victims[0].label

    return sorted(found, key=rank)


def _finding(cause: Cause, rows: Sequence[DropRow], window: Window, ignored: Callable[[str, Owner], bool]) -> Finding:
    packets = sum(row.packets for row in rows)
    per_owner: dict[tuple[str, str | None, str, str | None], tuple[Owner, int]] = {}
    for row in rows:
        owner, sum_ = per_owner.get(row.owner.identity, (row.owner, 0))
        per_owner[row.owner.identity] = owner, sum_ + row.packets
    victims = sorted(per_owner.values(), key=lambda pair: (-pair[1], pair[0].label))
    return Finding(
        cause=cause.slug,
        severity=cause.severities.judge(packets, window.seconds),
        confidence="likely"
        if cause.confidence == "proven" and not all(row.reason for row in rows)
        else cause.confidence,
        ignored=all(ignored(cause.slug, owner) for owner, _ in victims),
        title=cause.title,
        victims=tuple(owner for owner, _ in victims),
        culprits=(),
        packets=packets,
        connections=window.connections(rows),
        evidence=tuple(_evidence(rows, victims, window.seconds)),
        fix=cause.fix(rows),
        ruled_out=cause.ruled_out,
    )


def _evidence(rows: Sequence[DropRow], victims: Sequence[tuple[Owner, int]], seconds: float) -> Iterable[Evidence]:
    places: dict[tuple[str, str, str | None], int] = {}
    for row in rows:
        place = row.reason, row.location, row.hook
        places[place] = places.get(place, 0) + row.packets
    for (reason, location, hook), packets in sorted(places.items(), key=lambda item: -item[1])[:3]:
        at = f"{location} ({hook})" if hook else location
        yield Evidence(f"{reason or 'drop'} at {at}", packets, "packets", "skb:kfree_skb")
    yield Evidence(
        "rate", round(sum(count for _, count in victims) / max(seconds, 1e-9), 2), "packets/s", "skb:kfree_skb"
    )
    for owner, packets in victims[:5]:
        yield Evidence(f"dropped for {owner.label}", packets, "packets", f"attributed by {owner.how}")
