# Names of kernel functions: made-up symbol tables with the oddities of real ones, and the running kernel's.

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from k8sdiag.host.symbols import KernelSymbols

TABLE = b"""\
0000000000000000 A __per_cpu_start
ffffffff81000000 T _text
ffffffff81000000 T startup_64
ffffffff81001000 T ip_rcv
ffffffff81001000 T ip_rcv_alias
ffffffff81001200 t ip_rcv_finish_core.constprop.0
ffffffff81001400 t ip_rcv_core.isra.0
ffffffff81001600 T nf_hook_slow
ffffffff81001700 t nf_hook_slow.cold
ffffffff81001800 W weak_one
ffffffff81001a00 T last_of_the_text
ffffffff82000000 D some_data
ffffffff82000100 R some_constant
"""


@pytest.fixture
def symbols() -> KernelSymbols:
    return KernelSymbols(TABLE)


@pytest.mark.parametrize(
    ("location", "name"),
    [
        (0xFFFFFFFF81001001, "ip_rcv"),
        (0xFFFFFFFF810011FF, "ip_rcv"),
        (0xFFFFFFFF81001201, "ip_rcv_finish_core"),
        (0xFFFFFFFF81001500, "ip_rcv_core"),
        (0xFFFFFFFF81001710, "nf_hook_slow"),
        (0xFFFFFFFF81001900, "weak_one"),
    ],
)
def test_an_address_inside_a_function_has_its_name_without_suffix(
    symbols: KernelSymbols, location: int, name: str
) -> None:
    assert symbols.name(location).removesuffix("_alias") == name


def test_a_call_that_ends_a_function_is_named_after_the_function_that_called(symbols: KernelSymbols) -> None:
    # its return address is the first byte of the next function
    assert symbols.name(0xFFFFFFFF81001200) in ("ip_rcv", "ip_rcv_alias")
    assert symbols.name(0xFFFFFFFF81001800) == "nf_hook_slow"


def test_data_is_no_function(symbols: KernelSymbols) -> None:
    assert symbols.name(0xFFFFFFFF82000150) != "some_constant"
    assert symbols.name(0xFFFFFFFF82000050) != "some_data"


@pytest.mark.parametrize("location", [0, 1, 0x1000, 0xFFFFFFFF81000000])
def test_an_address_before_every_function_comes_back_as_hexadecimal(symbols: KernelSymbols, location: int) -> None:
    assert symbols.name(location) == hex(location)


def test_an_address_far_behind_every_function_comes_back_as_hexadecimal(symbols: KernelSymbols) -> None:
    location = 0xFFFFFFFF81001A00 + (1 << 30)
    assert symbols.name(location) == hex(location)


@pytest.mark.parametrize(
    ("function", "span"),
    [
        ("ip_rcv", (0xFFFFFFFF81001000, 0xFFFFFFFF81001200)),
        ("ip_rcv_alias", (0xFFFFFFFF81001000, 0xFFFFFFFF81001200)),
        ("ip_rcv_finish_core", (0xFFFFFFFF81001200, 0xFFFFFFFF81001400)),
        ("ip_rcv_core", (0xFFFFFFFF81001400, 0xFFFFFFFF81001600)),
        ("nf_hook_slow", (0xFFFFFFFF81001600, 0xFFFFFFFF81001700)),
        ("last_of_the_text", (0xFFFFFFFF81001A00, 0xFFFFFFFF82000000)),
    ],
)
def test_a_function_ends_where_the_next_symbol_begins(
    symbols: KernelSymbols, function: str, span: tuple[int, int]
) -> None:
    assert symbols.span(function) == span


@pytest.mark.parametrize("function", ["ip", "rcv", "ip_rcv_finish", "", "no_such_function", "nf_hook_slow_list"])
def test_a_part_of_a_name_is_no_function(symbols: KernelSymbols, function: str) -> None:
    assert symbols.span(function) is None


def test_the_whole_function_is_preferred_to_a_clone_of_it() -> None:
    text = (
        b"ffffffff81000000 T _text\nffffffff81000100 t work.constprop.0\nffffffff81000200 t work.isra.1\n"
        b"ffffffff81000300 T work\nffffffff81000400 T next\n"
    )
    assert KernelSymbols(text).span("work") == (0xFFFFFFFF81000300, 0xFFFFFFFF81000400)


MODULES = TABLE + (
    # symbols of a module stand in the order of its symbol table, not of their addresses
    b"ffffffffc0203000 t nft_late\t[nf_tables]\n"
    b"ffffffffc0201000 t nft_do_chain\t[nf_tables]\n"
    b"ffffffffc0209000 t nft_last\t[nf_tables]\n"
    b"ffffffffc0202000 t nft_expr.isra.0\t[nf_tables]\n"
    b"ffffffffc0301000 t br_pass\t[bridge]\n"
    b"ffffffffc0300000 t br_handle_frame\t[bridge]\n"
)


def test_functions_of_modules_are_named_although_they_are_not_in_order() -> None:
    symbols = KernelSymbols(MODULES)
    assert symbols.name(0xFFFFFFFFC0201800) == "nft_do_chain"
    assert symbols.name(0xFFFFFFFFC0202800) == "nft_expr"
    assert symbols.name(0xFFFFFFFFC0203800) == "nft_late"
    assert symbols.name(0xFFFFFFFFC0300100) == "br_handle_frame"


def test_a_function_of_a_module_ends_at_the_nearest_symbol() -> None:
    symbols = KernelSymbols(MODULES)
    assert symbols.span("nft_do_chain") == (0xFFFFFFFFC0201000, 0xFFFFFFFFC0202000)
    assert symbols.span("nft_late") == (0xFFFFFFFFC0203000, 0xFFFFFFFFC0209000)
    assert symbols.span("nft_expr") == (0xFFFFFFFFC0202000, 0xFFFFFFFFC0203000)  # has a suffix
    assert symbols.span("br_handle_frame") == (0xFFFFFFFFC0300000, 0xFFFFFFFFC0301000)


def test_many_functions_are_found_in_one_pass_as_each_by_itself() -> None:
    symbols = KernelSymbols(MODULES)
    names = ["ip_rcv", "ip_rcv_core", "nf_hook_slow", "nft_late", "br_pass", "no_such_function", "ip"]
    found = symbols.spans(names)
    assert found.keys() == {"ip_rcv", "ip_rcv_core", "nf_hook_slow", "nft_late", "br_pass"}
    assert found == {name: symbols.span(name) for name in found}


def test_a_function_of_a_module_begins_where_it_is() -> None:
    span = KernelSymbols(MODULES).span("nft_do_chain")
    assert span is not None
    assert span[0] == 0xFFFFFFFFC0201000


def test_the_last_function_of_all_has_an_end_too() -> None:
    span = KernelSymbols(MODULES).span("br_pass")
    assert span is not None
    assert span[0] == 0xFFFFFFFFC0301000 < span[1]


@pytest.mark.parametrize(
    "text", [b"", b"0000000000000000 T _text\n0000000000000000 T ip_rcv\n", b"ffffffff81001000 T ip_rcv\n"]
)
def test_hidden_addresses_are_noticed_and_give_no_names(text: bytes) -> None:
    symbols = KernelSymbols(text)
    assert symbols.hidden
    assert symbols.name(0xFFFFFFFF81001001) == "0xffffffff81001001"


def test_zero_is_no_address_of_a_function() -> None:
    assert KernelSymbols(b"0000000000000000 T _text\n0000000000000000 T ip_rcv\n").span("ip_rcv") is None


def test_a_readable_table_is_not_hidden(symbols: KernelSymbols) -> None:
    assert not symbols.hidden


@pytest.fixture(scope="module")
def running() -> KernelSymbols:
    found = KernelSymbols() if Path("/proc/kallsyms").exists() else None
    if found is None or found.hidden:
        pytest.skip("/proc/kallsyms hides its addresses here")
    return found


@pytest.mark.parametrize(
    "function", ["ip_rcv", "ip_local_deliver", "ip_forward", "nf_hook_slow", "__dev_queue_xmit", "tcp_v4_rcv"]
)
def test_the_running_kernels_functions_are_found_both_ways(running: KernelSymbols, function: str) -> None:
    span = running.span(function)
    if span is None:
        pytest.skip(f"this kernel has no {function}")
    start, end = span
    assert 0 < end - start < 1 << 16
    assert running.name(start + 1) == running.name(end)


def test_the_running_kernels_functions_do_not_overlap(running: KernelSymbols) -> None:
    names = ("ip_rcv", "ip_local_deliver", "ip_forward", "ip_output", "ip6_input", "__netif_receive_skb_core")
    spans = sorted(span for name in names if (span := running.span(name)))
    assert len(spans) >= 3
    assert all(before[1] <= after[0] for before, after in pairwise(spans))
