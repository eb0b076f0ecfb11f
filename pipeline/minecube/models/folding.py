"""Fold batch normalisations into the convolutions before them, for inference."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary


def folded(network: nn.Module, run: Callable[[], object]) -> nn.Module:
    """Fold each BatchNorm2d into the convolution connected only to it, in place.

    On a CPU this saves 10 to 25 % of the time. It changes the last bits of a logit.

    Args:
        network: The network, no longer learning.
        run: Sends a window through the network exactly as in use, and returns its output. Only
            operations of this thread are observed. Not called without batch normalisations.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        return network
    watch = _Watch(network)
    with watch.hooked(), torch.no_grad(), watch:
        given = run()
    watch.use(given, None)
    for convolution, norm in watch.pairs():
        rest = _without(norm)
        if rest is None:
            continue
        both = fuse_conv_bn_eval(convolution, norm)
        convolution.weight, convolution.bias = both.weight, both.bias
        for parent in list(network.modules()):
            for name, child in list(parent._modules.items()):
                if child is norm:
                    setattr(parent, name, rest)
    return network


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record of all tensor operations and of the part of the network running each.

    Parts are the network's convolutions and norms.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._parts = [
            m for m in network.modules() if type(m) is nn.Conv2d or isinstance(m, nn.BatchNorm2d)
        ]
        # Hooks may change inputs, outputs or weights.
        self._unfit: set[nn.Module] = {
            m for m in self._parts if m._forward_hooks or m._forward_pre_hooks
        }
        self._weights = {
            id(t): m
            for m in self._parts
            for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))
        }
        self._given_by = WeakTensorKeyDictionary()
        self._users: dict[nn.Module, set[nn.Module | None]] = defaultdict(set)
        self._sources: dict[nn.Module, set[nn.Module | None]] = defaultdict(set)
        self._inside: list[nn.Module] = []

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Record the calls of parts in this context."""
        hooks = [
            part.register_forward_pre_hook(self._enter, with_kwargs=True) for part in self._parts
        ]
        hooks += [part.register_forward_hook(self._leave) for part in self._parts]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def pairs(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        """Return the pairs of convolution and norm connected only to each other."""
        found = []
        for convolution, users in self._users.items():
            user, *others = users
            if (
                others
                or not isinstance(user, nn.BatchNorm2d)
                or not isinstance(convolution, nn.Conv2d)
            ):
                continue
            if self._sources[user] == {convolution} and not {user, convolution} & self._unfit:
                found.append((convolution, user))
        return found

    def use(self, values: object, by: nn.Module | None) -> None:
        """Record the use of these values, tensors among them, in a part or elsewhere (None)."""
        for value in tree_leaves(values):
            if isinstance(value, Tensor):
                if value in self._given_by:
                    self._users[self._given_by[value]].add(by)
                owner = self._weights.get(id(value))
                if owner is not None and owner is not by:
                    self._unfit.add(owner)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # never compiled; torch's default loads its compiler, taking a second

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record and run one operation."""
        self.use((args, kwargs), self._inside[-1] if self._inside else None)
        return func(*args, **(kwargs or {}))

    def _enter(self, part: nn.Module, args: Any, kwargs: Any) -> None:
        self._inside.append(part)
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        known = len(given) == 1 and given[0] in self._given_by
        self._sources[part].add(self._given_by[given[0]] if known else None)

    def _leave(self, part: nn.Module, _given: object, found: Tensor) -> None:
        self._inside.pop()
        self._given_by[found] = part


def _without(norm: nn.BatchNorm2d) -> nn.Module | None:
    """Return the rest of a folded layer; None if the layer cannot be folded."""
    if norm.running_mean is None or norm.training:
        return None
    if type(norm) is nn.BatchNorm2d:
        return nn.Identity()
    if type(norm).__name__ == "BatchNormAct2d" and type(norm).__module__.startswith("timm."):
        return nn.Sequential(OrderedDict((name, getattr(norm, name)) for name in ("drop", "act")))
    return None
