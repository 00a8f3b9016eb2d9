"""What can go wrong, said so that it can be mended: what happened, why, and what to do."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path


class K8sdiagError(Exception):
    """Root of all errors a user can meet. `help` ends the message: what to do."""

    HELP = ""
    exit_code = 1

    def __str__(self) -> str:
        text = super().__str__()
        return f"{text}\n{self.help()}" if self.help() else text

    def help(self) -> str:
        return self.HELP


class UsageError(K8sdiagError):
    """An option or an expression that cannot be understood."""

    exit_code = 2


class NotPermitted(K8sdiagError):
    """This process may not load BPF programs and look into other namespaces."""

    def __init__(self, missing: Sequence[str], *, is_root: bool) -> None:
        super().__init__("Not permitted to load BPF programs: missing " + ", ".join(missing) + ".")
        self._is_root = is_root

    def help(self) -> str:
        if self._is_root:
            return (
                "This is root without root's capabilities, as in a container. Run it privileged, in Kubernetes with "
                "`kubectl debug node/NODE --profile=sysadmin` or `securityContext: {privileged: true}`."
            )
        return f"Run: sudo {command_line()}"


class BccMissing(K8sdiagError):
    """No usable bcc package (the compiler of the probes) on this machine."""

    def __str__(self) -> str:
        return (
            f"The BPF compiler collection is missing: {Exception.__str__(self)}.\n"
            f"Install it: {bcc_install_command()}\n"
            "Reading traces (replay, check FILE, explain) works without it."
        )


class BtfMissing(K8sdiagError):
    """The kernel does not describe its types, so no probe can find its way in them."""

    HELP = (
        "Probes need a kernel built with CONFIG_DEBUG_INFO_BTF=y (file /sys/kernel/btf/vmlinux): "
        "kernels of Debian 11, Ubuntu 22.04, RHEL 9 and later have it.\nIn a container, mount the host's /sys."
    )

    def __str__(self) -> str:
        return f"No usable BTF: {Exception.__str__(self)}.\n{self.HELP}"


class ProbeRefused(K8sdiagError):
    """The kernel refused to load or attach a probe, or it does not compile for this kernel."""

    HELP = "`k8sdiag doctor` shows what this node allows; please report the lines above with its output."

    def __str__(self) -> str:
        return f"The kernel refused the probe: {Exception.__str__(self)}\n{self.HELP}"


class TraceError(K8sdiagError):
    """A trace file that cannot be read. The message says at which byte."""


def command_line() -> str:
    """The command that was typed, with the absolute path of the program: sudo searches other directories."""
    program = Path(sys.argv[0])
    path = program.resolve() if program.exists() else program
    words = [str(path), *sys.argv[1:]]
    if path.name == "__main__.py":
        words = [sys.executable, "-m", "k8sdiag", *sys.argv[1:]]
    if launcher := os.environ.get("K8SDIAG_LAUNCHER"):
        words = [launcher, *sys.argv[1:]]
    return shlex.join(words)


def bcc_install_command(os_release: str | None = None) -> str:
    """The package manager's line for this distribution, from /etc/os-release."""
    if os_release is None:
        path = Path("/etc/os-release")
        os_release = path.read_text() if path.exists() else ""
    if "fedora" in os_release or "rhel" in os_release or "amzn" in os_release:
        return "dnf install python3-bcc"
    if "alpine" in os_release:
        return "apk add py3-bcc"
    return "apt-get install --no-install-recommends python3-bpfcc"
