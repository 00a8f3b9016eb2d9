"""Readers of one kind of number each: probes' maps, and counters of the kernel."""
