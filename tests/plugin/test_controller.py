"""What passes between plugin/controller.py and the workers when one of them dies. Whole runs: test_plugin.py."""

from types import SimpleNamespace

import pytest

from harness.plugin.controller import Controller


def command(error):
    """A command of xdist to a worker for which sending raises `error`: what was logged."""

    def send(name, **words):
        raise error

    log: list[str] = []
    node = SimpleNamespace(sendcommand=send, workerinput={}, log=log.append)
    Controller.pytest_configure_node(SimpleNamespace(folder="there", continued=None), node)
    assert node.workerinput == {"moe_plan": "there", "moe_done": []}
    node.sendcommand("steal", indices=[1])
    return log


def test_a_command_to_a_dead_worker():
    """xdist may give a worker work before it knows of its death."""
    log = command(OSError("cannot send (already closed?)"))
    assert log == ["steal: the worker is dead: cannot send (already closed?)"]


def test_a_command_that_is_wrong():
    with pytest.raises(TypeError, match="not a word"):
        command(TypeError("not a word"))
