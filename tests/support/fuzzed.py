"""Backends that are wrong for some problems only, for fuzzing to find and to shrink."""

import os
import signal
import time

from tests.support.emulated import Emulated


class _Fuzzed(Emulated):
    """Right, except for problems and batches for which `wrong` returns True: zeros there."""

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
    """Wrong unless the intermediate size is a multiple of 16."""

    def wrong(self, problem, tokens):
        return problem.intermediate_size % 16 != 0


class ThreeTokensAndBias(_Fuzzed):
    """Wrong for three tokens and a layer with biases."""

    def wrong(self, problem, tokens):
        return tokens == 3 and problem.bias


class SecondCall(_Fuzzed):
    """Wrong in every call of the process but the first."""

    calls = 0

    def wrong(self, problem, tokens):
        self.calls += 1
        return self.calls > 1


class Dies(_Fuzzed):
    """Ends its process by a signal for padded rows."""

    def wrong(self, problem, tokens):
        if problem.padded:
            os.kill(os.getpid(), signal.SIGSEGV)
        return False


class Hangs(_Fuzzed):
    """Never returns for three tokens."""

    def wrong(self, problem, tokens):
        while tokens == 3:
            time.sleep(1)
        return False


class Refuses(_Fuzzed):
    """Supports nothing."""

    def supports(self, problem):
        return "dtype: none at all"


class Gibberish(_Fuzzed):
    """Gives a reason without a keyword."""

    def supports(self, problem):
        return "because"
