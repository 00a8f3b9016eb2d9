"""Everything that touches the machine: probes, counters, inventory. Nothing outside this package does."""
