"""Who goes first when a store is full: an order over keys, told of every use. Knows no sizes and no bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Eviction(ABC, Generic[K]):
    @abstractmethod
    def insert(self, key: K) -> None:
        """It is new here."""

    @abstractmethod
    def touch(self, key: K) -> None:
        """It was used."""

    @abstractmethod
    def remove(self, key: K) -> None:
        """It is gone, by whatever means. Evicted ones too are to be removed by the caller."""

    @abstractmethod
    def victim(self, may_go: Callable[[K], bool]) -> K | None:
        """Whose turn it is, of those that may go; None where nobody may."""


class Lru(Eviction[K]):
    """Least recently used first."""

    def __init__(self) -> None:
        self._order: OrderedDict[K, None] = OrderedDict()

    def insert(self, key: K) -> None:
        self._order[key] = None

    def touch(self, key: K) -> None:
        self._order.move_to_end(key)

    def remove(self, key: K) -> None:
        del self._order[key]

    def victim(self, may_go: Callable[[K], bool]) -> K | None:
        return next(filter(may_go, self._order), None)
