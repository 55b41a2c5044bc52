"""What the forwards of a decoder and a tower from graphs share: what they keep, and when it is of no use."""

from __future__ import annotations

import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

from .capture import Capture
from .obstacles import Watch


class GraphedForward:
    """A module's forward, from graphs where nothing watches it; put over the module's own.

    Args:
        module: whose forward it is.
        new_capture: makes what captures, on the module's device.
    """

    settings: ClassVar[tuple[str, ...]] = ("module", "new_capture")  # what copies and pickles take along

    def __init__(self, module: nn.Module, new_capture: Callable[[], Capture]) -> None:
        self.module, self.new_capture = module, new_capture
        self._start()

    def _start(self) -> None:
        self.graphs: OrderedDict[tuple, Any] = OrderedDict()
        self.watch: Watch | None = None
        self.capture: Capture | None = None
        self.lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles begin without graphs."""
        return {name: self.__dict__[name] for name in self.settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._start()

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.eager)

    @property
    def eager(self) -> Callable:
        """The forward that there would be without graphs."""
        return type(self.module).forward.__get__(self.module)

    def drop_what_has_changed(self) -> Watch:
        """Forget the graphs of a module that is another one now; return what watches it."""
        if self.watch is None or self.watch.has_changed():
            self.graphs.clear()
            self.watch = Watch(self.module)
        return self.watch
