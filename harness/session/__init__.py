"""One backend under one case: `session.Session` draws inputs, prepares the backend, calls and judges.

`applies.why_not` says whether a case runs at all; `oracle_cache.ORACLE_CACHE` keeps what the backends of a process
share, and forgets it.
"""
