"""Live diagnosis of Kubernetes node networking with eBPF: who loses packets, where in the kernel, and why."""

__version__ = "0.1.0"
