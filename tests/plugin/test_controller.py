"""What passes between plugin/controller.py and the workers when one of them dies. Whole runs: test_plugin.py."""

import json
from threading import Thread
from types import SimpleNamespace

import pytest

from harness.plugin.controller import Controller
from harness.plugin.process import Process


def command(error):
    """A command of xdist to a worker for which sending raises `error`: what was logged."""

    def send(name, **words):
        raise error

    log: list[str] = []
    node = SimpleNamespace(sendcommand=send, workerinput={}, log=log.append)
    Controller.pytest_configure_node(SimpleNamespace(notes="there"), node)
    assert node.workerinput == {"moe_notes": "there"}
    node.sendcommand("steal", indices=[1])
    return log


def test_a_command_to_a_dead_worker():
    """xdist may give a worker work before it knows of its death."""
    log = command(OSError("cannot send (already closed?)"))
    assert log == ["steal: the worker is dead: cannot send (already closed?)"]


def test_a_command_that_is_wrong():
    with pytest.raises(TypeError, match="not a word"):
        command(TypeError("not a word"))


def test_a_note_is_read_whole_while_it_is_written(tmp_path):
    """The controller reads every worker's note when one of them dies; the others go on writing theirs."""
    worker = SimpleNamespace(worker={"moe_notes": str(tmp_path), "workerid": "gw0"})
    Process.note(worker, nodeid="first")
    writing = Thread(target=lambda: [Process.note(worker, nodeid="x" * n) for n in range(2000)])
    writing.start()
    while writing.is_alive():
        assert [set(json.loads(path.read_text())) for path in tmp_path.glob("*.json")] == [{"nodeid"}]
    writing.join()
