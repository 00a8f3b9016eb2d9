# What stands behind the source touches no machine: traces are read on laptops that have no kernel to ask, and give
# the same answer there.

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "k8sdiag"
MACHINE = ("bcc", "pyroute2", "psutil", "textual")
CORE = (
    "facts", "source", "snapshot", "identity", "conntrack", "engine", "causes", "trace", "views", "tracking", "details",
    "words", "report", "explain", "errors",
)  # fmt: skip


def loaded_by(script: str, *words: str) -> set[str]:
    """Top-level names of all modules in memory after `script`, run in a process of its own."""
    ending = "\nimport json, sys\nsys.stderr.write('LOADED ' + json.dumps(sorted(sys.modules)))\n"
    done = subprocess.run(
        [sys.executable, "-c", script + ending, *words],
        capture_output=True, text=True, check=True, timeout=60, cwd="/",
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), "COLUMNS": "100"},
    )  # fmt: skip
    return set(json.loads(done.stderr.rpartition("LOADED ")[2]))


@pytest.mark.parametrize("module", CORE)
def test_the_core_is_imported_without_anything_that_asks_the_machine(module: str) -> None:
    loaded = loaded_by(f"import k8sdiag.{module}")
    assert f"k8sdiag.{module}" in loaded
    assert not loaded & set(MACHINE)
    assert not [name for name in loaded if name.startswith(("k8sdiag.host", "k8sdiag.tui", "k8sdiag.cli"))]


def test_the_command_line_is_imported_without_anything_that_asks_the_machine() -> None:
    loaded = loaded_by("import k8sdiag.cli")
    assert not loaded & set(MACHINE)
    assert not [name for name in loaded if name.startswith(("k8sdiag.host", "k8sdiag.tui"))]


@pytest.mark.parametrize("words", [("--help",), ("--version",), ("check", "--help")], ids=" ".join)
def test_help_needs_the_standard_library_only(words: tuple[str, ...]) -> None:
    run = "import runpy, sys\ntry:\n    runpy.run_module('k8sdiag', run_name='__main__', alter_sys=True)\nexcept SystemExit as end:\n    assert not end.code, end.code\n"  # noqa: E501
    loaded = loaded_by(run, *words)
    assert "k8sdiag.cli" in loaded
    assert not loaded & {*MACHINE, "msgspec", "rich", "backports"}
    assert not loaded & {"k8sdiag.host", "k8sdiag.tui", "k8sdiag.engine"}


def test_the_loader_needs_the_standard_library_only() -> None:
    """It runs beside the distribution's bcc, perhaps without our packages."""
    loaded = loaded_by("import k8sdiag.host.loader")
    assert not loaded & {*MACHINE, "msgspec"}


ASKS = frozenset((
    "time", "os", "socket", "subprocess", "pathlib", "shutil", "tempfile", "glob", "platform", "resource", "signal",
    "threading", "multiprocessing", "asyncio", "select", "selectors", "ctypes", "fcntl", "mmap", "pwd", "grp",
    "getpass", "locale", "random", "secrets", "uuid", "urllib", "http", "ssl",
))  # fmt: skip
EXCEPT = {
    "source.py": {"time"},  # Paced, which only faces use: see below
    "trace.py": {"os", "pathlib", "stdin", "environ"},  # file I/O, and SUDO_UID: whose a file shall be
    "errors.py": {"os", "pathlib", "argv", "environ"},  # names the command to type and the package to install
}


def core_files() -> list[Path]:
    outside = {"host", "tui", "cli.py", "__main__.py", "__pycache__", "probes"}
    return sorted(path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] not in outside)


def asked(text: str) -> set[str]:
    """Clock, environment, files and processes that a module reaches for."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names} & ASKS
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module.split(".")[0]} & ASKS
            found |= {"k8sdiag.host"} & {".".join(node.module.split(".")[:2])}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found |= {node.func.id} & {"open", "input", "exec", "eval", "__import__"}
        elif isinstance(node, ast.Attribute):
            found |= {node.attr} & {"now", "utcnow", "today", "stdin", "argv", "environ", "getenv"}
    return found


def test_the_check_below_sees_what_it_is_for() -> None:
    assert asked("import os.path") == {"os"}
    assert asked("from time import monotonic") == {"time"}
    assert asked("from datetime import datetime\ndatetime.now()") == {"now"}
    assert asked("def f():\n    import socket\n    open('x')") == {"socket", "open"}
    assert asked("from k8sdiag.host.btf import Btf") == {"k8sdiag.host"}
    assert asked("from datetime import datetime, timezone\nfrom ipaddress import ip_address") == set()


def test_the_core_is_more_than_a_few_files() -> None:
    names = {str(path.relative_to(PACKAGE)) for path in core_files()}
    assert {f"{name}.py" for name in CORE if name != "causes"} | {"causes/__init__.py"} <= names


@pytest.mark.parametrize("path", core_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_core_module_asks_for_no_clock_file_process_or_environment(path: Path) -> None:
    assert asked(path.read_text()) <= EXCEPT.get(str(path.relative_to(PACKAGE)), set())


def test_only_pacing_looks_at_the_clock() -> None:
    """In source.py, `time` is used inside Paced and nowhere else."""
    tree = ast.parse((PACKAGE / "source.py").read_text())
    (paced,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Paced"]
    within = set(ast.walk(paced))
    uses = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "time"]
    assert uses
    assert all(node in within for node in uses)
