# What ships, and what the launcher does on a machine that lacks something. The launcher is run for real, in
# copies of the checkout that require no or unobtainable Python packages: nothing is fetched from a network.

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import k8sdiag

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CHECKOUT = Path(__file__).resolve().parents[2]
SCRIPTS = [
    ".ci/run",
    *sorted(f"scripts/{path.name}" for path in (CHECKOUT / "scripts").iterdir() if path.is_file()),
]
SHELL_SCRIPTS = [
    name for name in SCRIPTS if name.endswith(".sh") or (CHECKOUT / name).read_text().startswith("#!/bin/sh\n")
]
# what an administrator's shell has, and nothing of the test's own environment
PLAIN_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

PRINT_ARGUMENTS = """
import os, sys
from k8sdiag import here
print(here, *sys.argv[1:], sep="|")
sys.exit(int(os.environ.get("EXIT", "0")))
"""


def pyproject() -> dict[str, Any]:
    read: dict[str, Any] = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    return read


@dataclass
class Copy:
    """A checkout with the real scripts, and a package that prints its arguments instead of the real one."""

    root: Path
    venv: Path

    def command(self, *words: str) -> list[str]:
        return [str(self.root / "scripts/k8sdiag"), *words]

    def environment(self, **more: str) -> dict[str, str]:
        return {
            "PATH": PLAIN_PATH,
            "HOME": str(self.root / "home"),
            "K8SDIAG_VENV": str(self.venv),
            "PIP_NO_INDEX": "1",
            "PIP_CONFIG_FILE": os.devnull,
            **more,
        }

    def run(self, *words: str, cwd: Path | None = None, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words),
            env=self.environment(**more),
            cwd=cwd or self.root,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )


def make_copy(root: Path, *requirements: str) -> Copy:
    requirements = requirements or ("nothing==1; sys_platform == 'nowhere'",)  # pip passes over it
    shutil.copytree(CHECKOUT / "scripts", root / "scripts")
    lines = "".join(f'    "{requirement}",\n' for requirement in requirements)
    root.joinpath("pyproject.toml").write_text(f"[project]\ndependencies = [\n{lines}]\n")
    package = root / "k8sdiag"
    package.mkdir()
    package.joinpath("__init__.py").write_text("here = __file__\n")
    package.joinpath("__main__.py").write_text(PRINT_ARGUMENTS)
    return Copy(root, root.parent / f"{root.name}-venv")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    """Prepared once, in a directory with a space in its name."""
    copy = make_copy(tmp_path_factory.mktemp("launcher") / "a checkout")
    done = copy.run("explain")
    assert done.returncode == 0, done.stderr
    return copy


# ---- what ships


def test_the_package_and_pyproject_agree_on_the_version() -> None:
    assert pyproject()["project"]["version"] == k8sdiag.__version__


def test_every_requirement_is_pinned_and_none_is_the_bcc_of_the_package_index() -> None:
    project = pyproject()
    for requirement in [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]:
        name, _, version = requirement.split(";")[0].partition("==")
        assert re.fullmatch(r"[0-9][0-9a-z.]*", version.strip()), requirement
        assert name != "bcc"


@pytest.mark.parametrize("kind", ["run", "dev"])
def test_the_launcher_reads_the_same_requirements_as_a_toml_parser(kind: str) -> None:
    script = f"checkout=$1; . scripts/setup.sh; requirements {kind}"
    read = subprocess.run(
        ["sh", "-euc", script, "sh", str(CHECKOUT)], cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    expected = pyproject()["project"]["dependencies"]
    if kind == "dev":
        expected = expected + pyproject()["dependency-groups"]["dev"]
    assert read.stdout.splitlines() == expected


def shipped_files() -> set[str]:
    """Sources as they are named inside a wheel."""
    names = set()
    for folder, inside in (("k8sdiag", "k8sdiag"), ("probes", "k8sdiag/probes")):
        for path in (CHECKOUT / folder).rglob("*"):
            if path.is_file() and path.suffix not in {".pyc", ".o"}:
                names.add(f"{inside}/{path.relative_to(CHECKOUT / folder)}")
    return names


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(wheel, sdist): the sdist built from this checkout, the wheel from the unpacked sdist."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(folder), "-t"]
    subprocess.run([*build, "sdist"], cwd=CHECKOUT, check=True, capture_output=True)
    (sdist,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(sdist, folder / "unpacked")
    (source,) = (folder / "unpacked").iterdir()
    subprocess.run([*build, "wheel"], cwd=source, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel, sdist


def test_every_module_probe_and_stub_header_is_in_the_wheel(distributions: tuple[Path, Path]) -> None:
    shipped = shipped_files()
    assert "k8sdiag/probes/wire.h" in shipped
    assert any(name.startswith("k8sdiag/probes/kernel/") for name in shipped)
    with zipfile.ZipFile(distributions[0]) as wheel:
        inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
        assert inside == shipped
        (entry_points,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
        assert "k8sdiag = k8sdiag.cli:main" in wheel.read(entry_points).decode()
        assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_the_sdist_holds_what_is_needed_to_build_and_test(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[1]) as sdist:
        inside = {name.partition("/")[2] for name in sdist.getnames()}
    assert {name.replace("k8sdiag/probes/", "probes/") for name in shipped_files()} <= inside
    assert {*SCRIPTS, "LICENSE", "README.md", "tests/unit/test_packaging.py"} <= inside
    assert not any("__pycache__" in name or ".git/" in name for name in inside)


# ---- the scripts


def test_the_scripts_can_be_run() -> None:
    assert {".ci/run", "scripts/k8sdiag", "scripts/setup.sh", "scripts/test"} <= set(SHELL_SCRIPTS)
    for name in SCRIPTS:
        assert os.access(CHECKOUT / name, os.X_OK) == (name != "scripts/setup.sh"), name


def test_shellcheck_has_no_complaint_about_the_scripts() -> None:
    beside_python = Path(sysconfig.get_path("scripts")) / "shellcheck"
    shellcheck = str(beside_python) if beside_python.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, "-x", *SHELL_SCRIPTS], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("words", "status"), [(["replay", "x"], 1), (["check", "x"], 3), (["-v"], 1)])
def test_no_install_lists_what_is_missing_and_makes_nothing(tmp_path: Path, words: list[str], status: int) -> None:
    copy = make_copy(tmp_path / "checkout", "textual==8.2.8", "psutil==7.2.2; sys_platform == 'linux'")
    tmp_path.joinpath("checkout/x").touch()
    before = sorted(tmp_path.rglob("*"))
    done = copy.run(*words, "--no-install")
    assert done.returncode == status  # a monitoring system reads 1 as a warning, so check says 3
    assert done.stdout == ""
    assert "textual==8.2.8 psutil==7.2.2" in done.stderr
    assert str(copy.venv) in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_without_network_the_message_names_packages_and_remedy(tmp_path: Path) -> None:
    copy = make_copy(tmp_path / "checkout", "textual==8.2.8")
    done = copy.run("replay", "x")
    assert done.returncode == 1
    assert done.stdout == ""
    announced, complaint = done.stderr.splitlines()
    assert "textual==8.2.8" in announced
    assert str(copy.venv) in announced
    assert "could not install the Python packages textual==8.2.8" in complaint
    assert "PIP_FIND_LINKS" in complaint


def test_words_reach_the_program_whole_and_its_status_comes_back(prepared: Copy) -> None:
    done = prepared.run("replay", "a b", "", "--no-install", "*", "-x", EXIT="7")
    assert done.returncode == 7
    assert done.stderr == ""
    assert done.stdout == f"{prepared.root}/k8sdiag/__init__.py|replay|a b||*|-x\n"


def test_the_launcher_works_through_a_link_from_any_directory(prepared: Copy, tmp_path: Path) -> None:
    link = tmp_path / "k8sdiag"
    link.symlink_to(prepared.root / "scripts/k8sdiag")
    done = subprocess.run(
        [str(link), "explain"],
        env=prepared.environment(),
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == f"{prepared.root}/k8sdiag/__init__.py|explain\n", done.stderr


def test_no_module_of_the_current_directory_is_run(prepared: Copy, tmp_path: Path) -> None:
    for name in ("runpy", "k8sdiag", "sitecustomize", "os"):
        tmp_path.joinpath(f"{name}.py").write_text("raise SystemExit('taken over')\n")
    done = prepared.run("explain", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert "/k8sdiag/__init__.py|explain" in done.stdout


def test_a_second_start_adds_at_most_150_ms(prepared: Copy) -> None:
    def fastest_s(command: list[str]) -> float:
        taken = []
        for _ in range(7):
            start = time.perf_counter()
            subprocess.run(
                command, env=prepared.environment(), check=True, capture_output=True, stdin=subprocess.DEVNULL
            )
            taken.append(time.perf_counter() - start)
        return min(taken)

    python = str(prepared.venv / "bin/python")
    alone = fastest_s([python, "-c", "import runpy"])
    assert fastest_s(prepared.command("explain")) - alone <= 0.15


def test_an_installation_that_was_killed_is_done_again(tmp_path: Path) -> None:
    copy = make_copy(tmp_path / "checkout")
    stamp = copy.venv / "k8sdiag-stamp"
    first = subprocess.Popen(
        copy.command("explain"),
        env=copy.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    until_s = time.monotonic() + 30
    while not (copy.venv / "bin").exists() and time.monotonic() < until_s:
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGKILL)
    assert first.communicate()[0] == b""
    assert stamp.read_text() == "building\n"

    again = copy.run("explain")
    assert again.returncode == 0
    assert "installing once" in again.stderr
    assert "|explain" in again.stdout
    assert copy.run("explain").stderr == ""


def test_of_two_starts_at_once_one_installs_and_both_work(tmp_path: Path) -> None:
    copy = make_copy(tmp_path / "checkout")
    starts = [
        subprocess.Popen(
            copy.command("explain", word),
            env=copy.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for word in ("one", "two")
    ]
    outputs = [start.communicate(timeout=120) for start in starts]
    assert [start.returncode for start in starts] == [0, 0]
    assert [out.rpartition("|")[2] for out, _ in outputs] == ["one\n", "two\n"]
    assert sum(err.count("installing once") for _, err in outputs) == 1


def test_changed_pins_get_an_environment_of_their_own(tmp_path: Path) -> None:
    def place(copy: Copy) -> str:
        """Where the launcher would put the environment, by default."""
        done = copy.run("explain", "--no-install", K8SDIAG_VENV="", XDG_CACHE_HOME=str(tmp_path / "cache"))
        found = re.search(r"Python packages for (\S+):", done.stderr)
        assert found is not None
        return found[1]

    one = place(make_copy(tmp_path / "one", "textual==8.2.8"))
    same = make_copy(tmp_path / "same", "textual==8.2.8")
    same.root.joinpath("pyproject.toml").open("a").write("[tool.ruff]\nline-length = 79\n")
    other = place(make_copy(tmp_path / "other", "textual==8.2.7"))
    assert place(same) == one
    assert other != one
    cache = "/var/cache" if os.geteuid() == 0 else str(tmp_path / "cache")
    assert Path(one).parent == Path(cache) / "k8sdiag"


def test_a_directory_of_somebody_else_is_not_cleared(tmp_path: Path) -> None:
    copy = make_copy(tmp_path / "checkout")
    precious = copy.venv / "precious"
    precious.parent.mkdir()
    precious.write_text("data")
    done = copy.run("explain")
    assert done.returncode == 1
    assert "not made by k8sdiag" in done.stderr
    assert precious.read_text() == "data"


def test_the_licence_is_the_apache_licence_unchanged() -> None:
    text = (CHECKOUT / "LICENSE").read_bytes()
    assert hashlib.sha256(text).hexdigest() == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
