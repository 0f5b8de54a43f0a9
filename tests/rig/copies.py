"""Deep copies of sessions that may be compiled: of a guest that is cloned, with all its memory.

Python copies what instances of its own classes hold. Of a compiled class it knows nothing, and it
cannot make an instance without its `__init__`: so it is told what that takes, and which attributes
there are.
"""

import copyreg
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from vchan.session import Session
from vchan.session.contract import Counters
from vchan.session.handshake import Handshake
from vchan.session.liveness import Liveness
from vchan.session.receiver import Receiver, _Partial
from vchan.session.sender import Sender, _Outgoing
from vchan.wire.frames import Decoder

_MADE_OF: Final[dict[Any, Callable[[Any], tuple[Any, ...]]]] = {
    Session: lambda it: (it.config, bytes),
    Counters: lambda _: (),
    Handshake: lambda it: (it._config, bytes, it._sender, it._receiver),
    Liveness: lambda it: (it._config,),
    Receiver: lambda it: (it._config, it._counters),
    _Partial: lambda it: (it.total, b""),
    Sender: lambda it: (it._config, it._counters),
    _Outgoing: lambda _: (),
    Decoder: lambda _: (),
}
"""What each is made with; its attributes are set after that."""


def _reduced(made_of: Callable[[Any], tuple[Any, ...]], original: Any) -> Any:
    """As `copy` asks: what makes the copy, and of what, which is copied before."""
    kind = type(original)
    attributes = {name: getattr(original, name) for name in kind.__mypyc_attrs__}
    return _made, (kind, made_of(original), attributes)


def _made(kind: Any, made_of: tuple[Any, ...], attributes: dict[str, Any]) -> Any:
    made = kind(*made_of)
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def let_sessions_be_copied() -> None:
    """`copy.deepcopy` takes sessions from now on, compiled or not."""
    for kind, made_of in _MADE_OF.items():
        if hasattr(kind, "__mypyc_attrs__"):
            copyreg.pickle(kind, partial(_reduced, made_of))
