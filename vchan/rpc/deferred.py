"""An answer that a method of the daemon's own gives when it has it. Pure."""

from collections.abc import Callable
from typing import Any

_Told = Callable[[Any, float], object]
"""Told the result, or the exception, and the time."""


class Later:
    """Returned by a method in place of its result, which follows once by `answer`."""

    __slots__ = ("_early", "_told")

    def __init__(self) -> None:
        self._told: _Told | None = None
        self._early: tuple[Any, float] | None = None

    def answer(self, result: Any, now_s: float) -> None:
        """The result; an exception is the caller's to see."""
        if self._told is None:
            self._early = (result, now_s)
        else:
            self._told(result, now_s)

    def then(self, told: _Told) -> None:
        """Who is to be told."""
        self._told = told
        if self._early is not None:
            told(*self._early)
