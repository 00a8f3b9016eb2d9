"""Names and address ranges of kernel functions, from /proc/kallsyms.

>>> symbols = KernelSymbols()
>>> symbols.name(location)
'nft_do_chain'
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path

KALLSYMS = Path("/proc/kallsyms")
_PAGE_BYTES = 4096
_LONGEST_FUNCTION_BYTES = 1 << 20
"""No function comes near it; between the kernel and its modules, and behind them, lie larger gaps."""


class KernelSymbols:
    """The kernel's symbol table, read once and searched in two ways.

    Under kernel.kptr_restrict=2, or =1 without CAP_SYSLOG, every address reads as zero: `hidden` is then true
    and nothing is found.
    """

    def __init__(self, text: bytes | None = None) -> None:
        try:
            self._text = KALLSYMS.read_bytes() if text is None else text
        except OSError:
            self._text = b""
        text_begins = self._text.find(b" _text\n")
        self.hidden = text_begins < 0 or not self._address(self._text.rfind(b"\n", 0, text_begins) + 1)
        self._addresses: list[int] = []
        self._names: list[str] = []

    def span(self, function: str) -> tuple[int, int] | None:
        """[start, end) of one function; None where there is none of that name."""
        return self.spans([function]).get(function)

    def spans(self, functions: Iterable[str]) -> dict[str, tuple[int, int]]:
        """[start, end) by name, whatever suffixes the compiler gave (`.isra.0`, `.constprop.0`).

        A function ends where the nearest symbol behind it begins; where there is none, a page on is the best guess.
        All are looked for in one pass, which takes 10 ms; sorting the table would take 100.
        """
        found = {}
        for function, line in self._lines(functions).items():
            start = self._address(line)
            if start:
                tag = self._tag(line)
                end = self._nearest_in_module(line, start, tag) if tag else self._next_higher(line, start)
                found[function] = start, end or start + _PAGE_BYTES
        return found

    def _lines(self, functions: Iterable[str]) -> dict[str, int]:
        """Where the line of each function begins in the text: that of its clone only where it has none itself."""
        names = b"|".join(re.escape(function.encode()) for function in functions)
        whole: dict[str, int] = {}
        clones: dict[str, int] = {}
        for match in re.finditer(rb" (" + names + rb")(?:[\n\t]|\.(?!cold))", self._text):
            kind = clones if match[0].endswith(b".") else whole
            kind.setdefault(match[1].decode(), self._text.rfind(b"\n", 0, match.start()) + 1)
        return clones | whole

    def _address(self, line: int) -> int:
        return int(self._text[line : line + 16] or b"0", 16)

    def _next_higher(self, line: int, start: int) -> int:
        """The kernel's own symbols are sorted by address; aliases of one function share theirs."""
        while line := self._text.find(b"\n", line) + 1:
            if (address := self._address(line)) > start:
                return address
        return 0

    def _nearest_in_module(self, line: int, start: int, tag: bytes) -> int:
        """A module's symbols stand together, in the order of its symbol table."""
        first = line
        while first and self._tag(before := self._text.rfind(b"\n", 0, first - 1) + 1) == tag:
            first = before
        nearest = 0
        while self._tag(first) == tag:
            address = self._address(first)
            if address > start and (not nearest or address < nearest):
                nearest = address
            first = self._text.find(b"\n", first) + 1
        return nearest

    def _tag(self, line: int) -> bytes:
        """`[nf_tables]` at the end of a line, empty for the kernel's own symbols."""
        end = self._text.find(b"\n", line)
        return self._text[line:end].partition(b"\t")[2]

    def name(self, location: int) -> str:
        """The function a return address lies in: looked up one byte before it, suffixes cut at the first dot.

        A call that ends a function returns to the first byte of the next one, hence the one byte. An address
        before every function, or further behind one than functions are long, comes back as hexadecimal.
        """
        if not self._addresses:
            self._sort()
        index = bisect_right(self._addresses, location - 1) - 1
        if index < 0 or location - self._addresses[index] > _LONGEST_FUNCTION_BYTES:
            return f"{location:#x}"
        return self._names[index]

    def _sort(self) -> None:
        if self.hidden:
            return
        lines = self._text.splitlines()
        pairs = sorted((int(line[:16], 16), line[19:]) for line in lines if line[17:18] in (b"T", b"t", b"W", b"w"))
        self._addresses = [address for address, _ in pairs]
        self._names = [name.split(b"\t")[0].split(b".")[0].decode() for _, name in pairs]
