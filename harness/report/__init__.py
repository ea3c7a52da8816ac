"""The report: one HTML page of any number of runs.

Public: `data.payload`, the page's data, and `page.render`, its text. history.py finds the newest state of each place
and the shifts of times; performance.py has the times; assets/ is the page itself.
"""
