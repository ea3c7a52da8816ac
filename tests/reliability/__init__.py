"""How the harness stands what backends, kills and hostile files do to it: `python3 -m tests.reliability`."""
