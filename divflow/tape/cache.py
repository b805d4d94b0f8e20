"""A cache of bounded size for several threads, which drops the least recent value first."""

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

__all__ = ["Cache"]

Value = TypeVar("Value")


class Cache(Generic[Value]):
    """At most `size` values by key.

    Args:
        size: the number of values that are kept.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        # Reentrant: what is forgotten may end an object's life, and that may forget another value.
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable) -> Value | None:
        """The value kept under a key, or None."""
        return self._values.get(key)

    def keep(self, key: Hashable, value: Value) -> None:
        """Keep a value, in place of what was kept under that key."""
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            while len(self._values) > self._size:
                self._values.popitem(last=False)

    def forget(self, key: Hashable) -> None:
        """Forget what is kept under a key, if there is anything."""
        with self._lock:
            self._values.pop(key, None)
