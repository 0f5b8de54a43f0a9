"""In the place of an object that may be compiled: none of its methods could be replaced."""

from typing import Any


class StandIn:
    """Does what the object does that it stands in for, but what it is given to do otherwise."""

    def __init__(self, real: Any, **others: Any) -> None:
        self.real = real
        vars(self).update(others)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def __len__(self) -> int:
        return len(self.real)

    def __contains__(self, item: object) -> bool:
        return item in self.real
