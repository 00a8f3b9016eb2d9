"""Labs that are gone after the test."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from k8sdiag.host.lab import Lab

_numbers = itertools.count()


@pytest.fixture
def new_lab() -> Iterator[Callable[..., Lab]]:
    """Labs with names of their own, all gone at the end."""
    with ExitStack() as labs:

        def make(**options: object) -> Lab:
            prefix = f"t{os.getpid()}n{next(_numbers)}"
            return labs.enter_context(Lab(prefix=prefix, **options))  # type: ignore[arg-type]

        yield make


@pytest.fixture(autouse=True)
def needs_root() -> None:
    if os.geteuid():
        pytest.skip("needs root: loads BPF programs and makes network namespaces")
