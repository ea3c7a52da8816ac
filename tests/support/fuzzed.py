"""Backends that are wrong for some problems only: what fuzzing is to find, and to shrink to what matters."""

import os
import signal
import time

from tests.support.emulated import Emulated


class _Fuzzed(Emulated):
    """Right, but where `wrong` says so."""

    def __init__(self):
        super().__init__("fuzzed")

    def wrong(self, problem, tokens):
        return False

    def run(self, layer, hidden_states, topk_weights, topk_ids, out=None):
        result = super().run(layer, hidden_states, topk_weights, topk_ids, out)
        return result.zero_() if self.wrong(layer.problem, len(hidden_states)) else result


class Right(_Fuzzed):
    """Never wrong."""


class InnerTail(_Fuzzed):
    """The last columns of I are left out unless tiles of 16 hold them."""

    def wrong(self, problem, tokens):
        return problem.intermediate_size % 16 != 0


class ThreeTokensAndBias(_Fuzzed):
    def wrong(self, problem, tokens):
        return tokens == 3 and problem.bias


class SecondCall(_Fuzzed):
    """Wrong from the second call of the process on."""

    calls = 0

    def wrong(self, problem, tokens):
        self.calls += 1
        return self.calls > 1


class Dies(_Fuzzed):
    def wrong(self, problem, tokens):
        if problem.padded:
            os.kill(os.getpid(), signal.SIGSEGV)
        return False


class Hangs(_Fuzzed):
    def wrong(self, problem, tokens):
        while tokens == 3:
            time.sleep(1)
        return False


class Refuses(_Fuzzed):
    def supports(self, problem):
        return "dtype: none at all"


class Gibberish(_Fuzzed):
    def supports(self, problem):
        return "because"
