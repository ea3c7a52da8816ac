"""Backends that are right in a first call and wrong in a later one, as only a sequence of calls shows."""

from __future__ import annotations

import torch

from harness.backend import Layer
from tests.support.emulated import Emulated


def _copy(layer: Layer) -> Layer:
    return Layer(layer.problem, **{name: t.clone() for name, t in layer.tensors().items()})


class Stale(Emulated):
    """Copies the weights in the first call, and copies them again only if w13 is another tensor object."""

    def __init__(self):
        super().__init__("stale")

    def prepare(self, problem, layer):
        built = {}

        def call(x, weights, ids, out=None):
            if built.get("for") is not layer.w13:
                built.update({"for": layer.w13, "copy": _copy(layer)})
            return self.run(built["copy"], x, weights, ids, out)

        return call


class SharedByShape(Emulated):
    """Two layers of one shape share the weights of the layer that was prepared last."""

    def __init__(self):
        super().__init__("shared-by-shape")
        self.built = {}

    def prepare(self, problem, layer):
        key = (layer.w13.shape, layer.problem.layout)
        self.built[key] = layer
        return lambda x, weights, ids, out=None: self.run(self.built[key], x, weights, ids, out)


class LeftOver(Emulated):
    """A buffer that is not cleared when a batch is shorter than the one before: old sums are added to the output."""

    def __init__(self):
        super().__init__("left-over")

    def prepare(self, problem, layer):
        kept = {"rows": 0}

        def call(x, weights, ids, out=None):
            result = self.run(layer, x, weights, ids, out)
            if 0 < len(x) < kept["rows"]:
                result += 32
            kept["rows"] = len(x)
            return result

        return call


class WidthOfFirst(Emulated):
    """Reads the dtype of the ids in the first call, and takes later ids to be of that dtype."""

    def __init__(self):
        super().__init__("width-of-first")

    def prepare(self, problem, layer):
        seen = []

        def call(x, weights, ids, out=None):
            seen.append(ids.dtype)
            if ids.numel() and ids.dtype != seen[0]:
                ids = ids.contiguous().view(seen[0]).flatten()[: ids.numel()].reshape(ids.shape)
                ids = ids.clamp(0, problem.num_experts - 1)
            return self.run(layer, x, weights, ids, out)

        return call


class AfterAnError(Emulated):
    """Processes the ids before it checks them: after an error the next call computes with the old ids."""

    promises = {"errors"}

    def __init__(self):
        super().__init__("after-an-error")

    def prepare(self, problem, layer):
        from kernels.grouped import GroupedMM

        checked, kept = GroupedMM().prepare(problem, layer), []

        def call(x, weights, ids, out=None):
            try:
                result = checked(x, weights, ids, out=out)
            except (TypeError, ValueError):
                kept.append(torch.zeros_like(ids, dtype=torch.int32))
                raise
            if kept and kept[-1].shape == ids.shape:
                result.copy_(self.run(layer, x, weights, kept.pop()))
            return result

        return call


class NeverForgets(Emulated):
    """Updates a sum in place instead of computing it: after one NaN all later outputs are NaN."""

    def __init__(self):
        super().__init__("never-forgets")

    def prepare(self, problem, layer):
        total = torch.zeros(())

        def call(x, weights, ids, out=None):
            total.add_(x.float().sum())
            return self.run(layer, x, weights, ids, out).add_(total * 0)

        return call


class Transposes(Emulated):
    """Converts the layer's tensors in place, again at every prepare()."""

    def __init__(self):
        super().__init__("transposes")
        self.prepared = []

    def prepare(self, problem, layer):
        if any(layer is known for known in self.prepared):
            layer.w2.data = layer.w2.data.neg()
        self.prepared.append(layer)
        return super().prepare(problem, layer)


class OldConfiguration(Emulated):
    """Keeps the activation of the first call."""

    def __init__(self):
        super().__init__("old-configuration")

    def prepare(self, problem, layer):
        from dataclasses import replace

        def call(x, weights, ids, out=None):
            now = layer.problem
            old = now if problem.gated != now.gated else replace(now, activation=problem.activation)
            return self.run(replace(layer, problem=old), x, weights, ids, out)

        return call


WRONG = [Stale, SharedByShape, LeftOver, WidthOfFirst, AfterAnError, NeverForgets, Transposes, OldConfiguration]
