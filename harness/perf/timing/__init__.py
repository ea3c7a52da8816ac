"""Clocks, the roofline, compile time, and pytest-benchmark."""
