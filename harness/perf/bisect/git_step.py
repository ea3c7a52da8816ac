"""What `git bisect run` starts for every commit: asks the search that started git about it, and ends with its answer.

    python -m harness.perf.bisect.git_step DESCRIPTOR      an open socket, inherited

The measuring process lives longer than a step, so nothing but this question is left to the step.
"""

from __future__ import annotations

import socket
import subprocess
import sys

ABORT = 128  #: git bisect run stops at any exit code from here on


def main() -> int:
    """The exit code for git: 0 good, 1 bad, 125 skip, ABORT if nobody answers."""
    done = subprocess.run(["git", "rev-parse", "--verify", "BISECT_HEAD"], capture_output=True, text=True, check=True)
    with socket.socket(fileno=int(sys.argv[1])) as search:
        search.sendall(done.stdout.encode())
        answer = search.makefile().readline()
    return int(answer or ABORT)


if __name__ == "__main__":
    sys.exit(main())
