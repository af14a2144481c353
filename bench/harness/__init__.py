"""What all benchmarks share: options, a run and its record, clocks, the machine, tables and pictures."""
