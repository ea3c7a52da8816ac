"""Times of one call.

Public: Stopwatch, Clock and NotTimed (clock.py), ceilings and work (roofline.py), compiling (compile_time.py), and
device_clock and run_timed for pytest-benchmark (benchmark.py).
"""
