"""Names and address ranges of kernel functions, from /proc/kallsyms.

>>> symbols = KernelSymbols()
>>> symbols.name(location)
'nft_do_chain'
"""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path

KALLSYMS = Path("/proc/kallsyms")


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
        self.hidden = not self._text or b" _text\n" not in self._text or not self.span("_text")
        self._addresses: list[int] = []
        self._names: list[str] = []

    def span(self, function: str) -> tuple[int, int] | None:
        """[start, end) of a function, whatever suffix the compiler gave it (`.isra.0`, `.constprop.0`)."""
        at = self._find(function)
        if at < 0:
            return None
        start = int(self._text[self._text.rfind(b"\n", 0, at) + 1 :][:16], 16)
        if start == 0:
            return None
        # The text is sorted by address; aliases of one function share theirs.
        line = self._text.find(b"\n", at) + 1
        while line < len(self._text):
            end = int(self._text[line : line + 16], 16)
            if end > start:
                return start, end
            line = self._text.find(b"\n", line) + 1
        return start, start + 4096

    def _find(self, function: str) -> int:
        """Where the function's name stands in the text, or -1. Its unlikely parts (`.cold`) lie elsewhere."""
        name = b" " + function.encode()
        for ending in (b"\n", b"\t"):
            at = self._text.find(name + ending)
            if at >= 0:
                return at
        at = self._text.find(name + b".")
        while at >= 0 and self._text.startswith(b"cold", at + len(name) + 1):
            at = self._text.find(name + b".", at + 1)
        return at

    def name(self, location: int) -> str:
        """The function a return address lies in: looked up one byte before it, suffixes cut at the first dot.

        A call that ends a function returns to the first byte of the next one, hence the one byte. An address
        without a symbol comes back as hexadecimal.
        """
        if not self._addresses:
            self._sort()
        index = bisect_right(self._addresses, location - 1) - 1
        return self._names[index] if index >= 0 else f"{location:#x}"

    def _sort(self) -> None:
        if self.hidden:
            return
        lines = self._text.splitlines()
        pairs = sorted((int(line[:16], 16), line[19:]) for line in lines if line[17:18] in (b"T", b"t", b"W", b"w"))
        self._addresses = [address for address, _ in pairs]
        self._names = [name.split(b"\t")[0].split(b".")[0].decode() for _, name in pairs]
