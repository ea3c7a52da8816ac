"""Find the commit that made a metric worse.

Public: bisect, choose_metric and Refused (bisect.py), History (history.py), Log (log.py), Measurements and WorkerPool
(measure.py), result_lines (report.py). search.py is the Bayesian search, without git or a clock.
"""
