"""One call, counted exactly: launches, allocations, operators, machine code; and the baseline of these counts."""
