"""Speed: exact counts of a call, its times, and the commit that changed them. metrics.py lists all metrics."""
