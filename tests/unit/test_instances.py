# Instances are real processes here: whether a dead one still counts is for the kernel to say.

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from k8sdiag.host.instances import DIRECTORY, Instance, living

CHECKOUT = Path(__file__).resolve().parents[2]
ANOTHER = """
import sys
from pathlib import Path
from k8sdiag.host.instances import Instance
with Instance(Path(sys.argv[1])) as instance:
    print(instance.unannounced or "ready", flush=True)
    sys.stdin.read()
"""
COMES_AND_GOES = """
import sys, time
from pathlib import Path
from k8sdiag.host.instances import Instance
end_s = time.monotonic() + 1.5
while time.monotonic() < end_s:
    with Instance(Path(sys.argv[1])) as instance:
        instance.others()
        assert not instance.unannounced, instance.unannounced
"""


@contextmanager
def another(root: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", ANOTHER, str(root)],
        cwd=CHECKOUT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.stdin.close()
        process.wait(10)
        process.stdout.close()


def test_living_instances_are_named_and_oneself_is_not(tmp_path: Path) -> None:
    with another(tmp_path) as one, another(tmp_path) as two, Instance(tmp_path) as mine:
        assert [other.pid for other in mine.others()] == sorted([one.pid, two.pid])
        assert all(other.here for other in mine.others())
        said = mine.capability()
        assert said.status == "full"
        assert f"pid {one.pid} (" in said.why
        assert f"pid {two.pid} (" in said.why


def test_an_instance_alone_has_nothing_to_say(tmp_path: Path) -> None:
    with Instance(tmp_path) as mine, Instance(tmp_path) as again:
        assert mine.others() == again.others() == []
        assert mine.capability().why == ""


def test_a_killed_instance_does_not_count_and_its_file_goes(tmp_path: Path) -> None:
    with another(tmp_path) as victim, Instance(tmp_path) as mine:
        assert [other.pid for other in mine.others()] == [victim.pid]
        victim.kill()
        victim.wait(10)
        assert len(os.listdir(tmp_path / DIRECTORY)) == 2
        assert mine.others() == []
        assert len(os.listdir(tmp_path / DIRECTORY)) == 1
        assert living(tmp_path / DIRECTORY) == []


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    with another(tmp_path):
        pass
    mine = Instance(tmp_path)
    mine.close()
    mine.close()
    assert not (tmp_path / DIRECTORY).exists()


def test_a_file_that_nobody_holds_is_no_instance_whatever_it_says(tmp_path: Path) -> None:
    directory = tmp_path / DIRECTORY
    directory.mkdir(parents=True)
    (directory / "1-old").write_text('{"pid":1,"pid_namespace":1,"command":"k8sdiag top"}')
    assert living(directory) == []
    assert os.listdir(directory) == []


def test_an_instance_of_another_pid_namespace_is_said_to_be_one(tmp_path: Path) -> None:
    with another(tmp_path) as other:
        (file,) = (tmp_path / DIRECTORY).iterdir()
        text = file.read_text()
        here = os.stat("/proc/self/ns/pid").st_ino
        with file.open("r+") as there:  # the same file, so it stays locked
            there.write(text.replace(f":{here},", f":{here - 1},"))
        (found,) = living(tmp_path / DIRECTORY)
        assert found.label.startswith(f"pid {other.pid} of another PID namespace (")


def test_where_nothing_can_be_written_the_watch_goes_on(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("in the way")
    with Instance(tmp_path) as mine:
        assert mine.others() == []
        said = mine.capability()
        assert said.status == "missing"
        assert "Not a directory" in said.why


def test_a_file_taken_for_stale_before_it_was_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = fcntl.flock
    met: list[int] = []

    def somebody_comes_by(fd: int, operation: int) -> None:
        if operation == fcntl.LOCK_EX and not met:
            met.append(fd)
            assert living(tmp_path / DIRECTORY) == []  # which removes the file
        really(fd, operation)

    monkeypatch.setattr(fcntl, "flock", somebody_comes_by)
    with Instance(tmp_path):
        assert met
        assert len(os.listdir(tmp_path / DIRECTORY)) == 1


def test_a_directory_that_the_last_one_took_along_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = tempfile.mkstemp
    left: list[Path] = []

    def the_last_one_leaves(prefix: str, dir: Path) -> tuple[int, str]:  # noqa: A002  (mkstemp's own name)
        if not left:
            left.append(dir)
            dir.rmdir()
        return really(prefix=prefix, dir=dir)

    monkeypatch.setattr(tempfile, "mkstemp", the_last_one_leaves)
    with Instance(tmp_path) as mine:
        assert left == [tmp_path / DIRECTORY]
        assert mine.unannounced == ""
        assert len(os.listdir(tmp_path / DIRECTORY)) == 1


def test_coming_and_going_at_once_never_hides_one_that_stays(tmp_path: Path) -> None:
    with ExitStack() as stack, another(tmp_path) as stays:
        crowd = [
            subprocess.Popen(
                [sys.executable, "-c", COMES_AND_GOES, str(tmp_path)], cwd=CHECKOUT, stderr=subprocess.PIPE
            )
            for _ in range(3)
        ]
        for process in crowd:
            stack.callback(process.kill)
        looks = 0
        while any(process.poll() is None for process in crowd):
            assert stays.pid in [other.pid for other in living(tmp_path / DIRECTORY)]
            looks += 1
            time.sleep(0.01)
        assert looks > 20
        for process in crowd:
            assert process.communicate(timeout=10)[1] == b""
            assert process.returncode == 0
    assert not (tmp_path / DIRECTORY).exists() or os.listdir(tmp_path / DIRECTORY) == []
