"""Backends that cannot be loaded: each is one line and an exit code of wrong usage, before any case."""

from __future__ import annotations

MODULE, SPEC = "broken_backend", "broken_backend:Broken"
HEAD = """import os, signal, sys
from tests.support.emulated import Emulated


class Broken(Emulated):
    def __init__(self):
        super().__init__("broken")

"""

#: What is wrong -> the rest of the module.
LOADING = {
    "its class needs an argument": "    def __init__(self, size):\n        pass\n",
    "__init__ raises": "    def __init__(self):\n        raise ValueError('no')\n",
    "__init__ raises SystemExit(0)": "    def __init__(self):\n        raise SystemExit(0)\n",
    "__init__ raises KeyboardInterrupt": "    def __init__(self):\n        raise KeyboardInterrupt\n",
    "__init__ calls os._exit(0)": "    def __init__(self):\n        os._exit(0)\n",
    "a property raises": "    @property\n    def promises(self):\n        raise ValueError('no')\n",
    "a property raises GeneratorExit": "    @property\n    def follows(self):\n        raise GeneratorExit\n",
    "devices = None": "    devices = None\n",
    "devices = 'cpu'": "    devices = 'cpu'\n",
    "devices = {'tpu'}": "    devices = {'tpu'}\n",
    "name = 7": "    name = property(lambda self: 7, lambda self, value: None)\n",
    "name = ''": "    name = property(lambda self: '', lambda self, value: None)\n",
    "name has control characters": "    name = property(lambda self: 'a\\n::error::b', lambda self, value: None)\n",
    "name is a path": "    name = property(lambda self: '../../x', lambda self, value: None)\n",
    "name is a built-in's": "    name = property(lambda self: 'triton', lambda self, value: None)\n",
    "prepare = None": "    prepare = None\n",
    "a misspelt attribute": "    suports = lambda self, problem: None\n",
    "a misspelt promise": "    promises = {'no_waits'}\n",
    "available() raises": "    def available(self):\n        raise ValueError('no')\n",
    "available() is 7": "    def available(self):\n        return 7\n",
    "the import raises": "raise ValueError('no')\n",
    "the import raises SystemExit(0)": "sys.exit(0)\n",
    "the import raises KeyboardInterrupt": "raise KeyboardInterrupt\n",
    "the import calls os._exit(0)": "os._exit(0)\n",
    "the import reads a null pointer": "import ctypes\nctypes.string_at(0)\n",
    "the import is no Python": "def\n",
}

#: Those that `verify` tries: it starts pytest in a new process, which takes seconds, and says what that says.
VERIFIED = (
    "its class needs an argument",
    "a misspelt promise",
    "__init__ calls os._exit(0)",
    "the import raises SystemExit(0)",
)
