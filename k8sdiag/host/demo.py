"""`k8sdiag demo`: a lab with a few faults that keep happening, for who has no cluster at hand."""

from __future__ import annotations

import threading

from k8sdiag.host.lab import Lab, PodSpec

FAULTS = (
    ("shop/cart-7d9f8c6b5-x2x4q", "closed-port", 23),
    ("shop/web-6945db96b4-bbf8p", "nft-forward", 17),
    ("billing/db-0", "udp-rcvbuf", 31),
    ("billing/api-59c7b6f4d-k9qzt", "rp-filter", 11),
    ("monitoring/agent-4xk2p", "tc-ingress", 13),
    ("payments/ledger-0", "snat-clash", 7),
)
"""Pod, fault of the lab, packets each time round."""


class Demo:
    """While the context lasts, the faults are injected again and again; then nothing of it is left."""

    def __init__(self) -> None:
        pods = [PodSpec(namespace, name) for namespace, name in (owner.split("/") for owner, _, _ in FAULTS)]
        self._lab = Lab(prefix="demo", pods=pods)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._inject, name="demo", daemon=True)

    def _inject(self) -> None:
        while not self._ending.is_set():
            for owner, fault, packets in FAULTS:
                if self._ending.wait(0.1):
                    return
                self._lab.inject(fault, packets, owner)

    def __enter__(self) -> Demo:
        self._lab.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ending.set()
        self._thread.join(20)
        self._lab.__exit__(None, None, None)
