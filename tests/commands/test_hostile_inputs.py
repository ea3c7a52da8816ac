"""Every hostile command line ends with one line and exit code 2. Each runs in a forked copy of this process."""

import os
import signal
import time
import traceback
from pathlib import Path

import pytest

from harness import cli
from harness.mutate import bugs, runner  # noqa: F401 - before the fork
from harness.perf.bisect import bisect  # noqa: F401
from harness.problem import families
from harness.run import fuzz  # noqa: F401
from tests.support.hostile_inputs import HostileInput, hostile_inputs

PATIENCE = 60  #: seconds after which a command counts as hanging
INPUTS = list(hostile_inputs())
NAMES = {module.__name__.rpartition(".")[2] for module in cli.COMMANDS}


def command_of(hostile: HostileInput) -> str:
    return hostile.argv[0] if hostile.argv and hostile.argv[0] in NAMES else "none"


COMMANDS = sorted({command_of(hostile) for hostile in INPUTS})


def ends(hostile: HostileInput, folder: Path) -> tuple[int, str]:
    """(exit code, output) of a command in a new folder."""
    folder.mkdir()
    for name, content in hostile.files.items():
        (folder / name).write_bytes(content)
    child = os.fork()
    if not child:
        code = 70
        try:
            os.setsid()
            os.chdir(folder)
            for number in (1, 2):
                os.dup2(os.open(folder / ".output", os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
            with os.fdopen(1, "w", closefd=False) as out, os.fdopen(2, "w", closefd=False) as err:
                cli.sys.stdout, cli.sys.stderr = out, err
                try:
                    code = cli.main([word.replace("{dir}", str(folder)) for word in hostile.argv])
                except BaseException:
                    traceback.print_exc()
        finally:
            os._exit(code)
    end = time.monotonic() + PATIENCE
    while not (found := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return -1, f"no answer in {PATIENCE} s"
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(found[1]), (folder / ".output").read_text()


def test_there_are_enough_of_every_command():
    assert len(INPUTS) >= 150 and set(COMMANDS) >= {"run", "fuzz", "compare", "bisect", "mutate", "matrix", "structure"}
    assert len({hostile.name for hostile in INPUTS}) == len(INPUTS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_hostile_command_line_is_one_line_and_never_green(command, tmp_path):
    families.families()
    wrong = {}
    for n, hostile in enumerate(h for h in INPUTS if command_of(h) == command):
        code, output = ends(hostile, tmp_path / str(n))
        if code != 2 or output.count("\n") != 1 or not output.startswith("moe-harness: ") or len(output) > 2100:
            wrong[hostile.name] = (code, output[-300:])
    assert wrong == {}


def test_a_hostile_command_line_that_were_accepted_would_be_noticed(tmp_path):
    code, output = ends(HostileInput("good", ["list", "--grammar"]), tmp_path / "0")
    assert code == 0 and output.count("\n") > 1
