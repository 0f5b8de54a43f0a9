"""What programs hand to `Client` and `Agent`: looked at before anything is queued or served.

Rules of this file
1. No I/O, no clock, no logging.
2. A wrong argument is a ConfigError with its name, what was given and what was expected; one that
   is right but too much is a LimitExceeded. What would fail later, elsewhere or silently does not
   pass.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, TypeVar

from vchan.errors import ConfigError, LimitExceeded
from vchan.rpc.messages import NAME_BYTES_MAX
from vchan.rpc.reports import PRODUCT_CHARS_MAX, is_product

TIMEOUT_S_MAX: Final = 86400.0
"""The longest time of a request: a day. A longer one is most likely a mistake of unit."""
GIVEN_CHARS_MAX: Final = 80
"""Of a wrong value that a refusal quotes."""
PRIORITIES: Final = ("audit", "debug", "info", "warn", "error", "critical", "sample")
"""A notification's, as oslo.messaging has them: another reaches no listener."""
DAEMONS_TOPICS: Final = ("vchan.guest", "vchan.host")
"""What the daemons answer themselves: an agent that served it would never be asked."""

_RAW_MARK: Final = "vchan_raw"
_QUICK_MARK: Final = "vchan_quick"
_GENERATOR: Final = 0x20 | 0x200  # of code objects' flags, as `inspect` has them: it starts slowly
_COROUTINE: Final = 0x80 | 0x100
_NO_ENDPOINTS: Final = (str, bytes, int, float, list, tuple, dict, set, frozenset, type(None))


def wrong(name: str, given: object, expected: str) -> ConfigError:
    """What to raise for a wrong argument."""
    text = repr(given)
    if len(text) > GIVEN_CHARS_MAX:
        text = f"{text[:GIVEN_CHARS_MAX]}..."
    return ConfigError(name, f"{text} is not {expected}")


def check_name(what: str, name: object, *, may_be_empty: bool = False) -> None:
    """An exchange's, topic's or server's name, or a method's.

    Raises:
        ConfigError: It is no text, is empty, or is not printable.
        LimitExceeded: It is over NAME_BYTES_MAX bytes.
    """
    if not isinstance(name, str):
        raise wrong(what, name, "a text")
    if not name and not may_be_empty:
        raise wrong(what, name, "a name: it is empty")
    if not name.isprintable():  # no rule of a host's policy lets such a name through
        raise wrong(what, name, "a printable name")
    if 4 * len(name) > NAME_BYTES_MAX and (size := len(name.encode())) > NAME_BYTES_MAX:
        raise LimitExceeded(what, size, NAME_BYTES_MAX, "NAME_BYTES_MAX")


def check_optional_name(what: str, name: object) -> None:
    """A name, or None."""
    if name is not None:
        check_name(what, name)


def check_topic(topic: object) -> None:
    """A topic that is to be served."""
    check_name("topic", topic)
    if topic in DAEMONS_TOPICS:
        raise wrong("topic", topic, "an agent's to serve: a daemon of vchan's answers there itself")


def check_seconds(name: str, seconds: object) -> None:
    """A request's time."""
    good = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not good or not 0 < seconds <= TIMEOUT_S_MAX:  # type: ignore[operator]  # also NaN
        raise wrong(name, seconds, f"over 0 and at most {TIMEOUT_S_MAX:g} seconds")


def check_version(version: object) -> None:
    """Of an interface: MAJOR.MINOR, perhaps with a revision, which is not heeded."""
    good = isinstance(version, str) and version.isascii()
    parts = version.split(".") if isinstance(version, str) and good else []
    if len(parts) not in (2, 3) or not all(part.isdecimal() for part in parts):
        raise wrong("version", version, "MAJOR.MINOR, as in 1.0")


def check_product(product: object) -> None:
    """What an agent says that it is; None: nothing.

    Raises:
        ConfigError: It is no NAME/VERSION.
    """
    if product is not None and not (isinstance(product, str) and is_product(product)):
        expected = f"NAME/VERSION of {PRODUCT_CHARS_MAX} printable characters at most, no space"
        raise wrong("product", product, expected)


def check_mapping(what: str, given: object) -> None:
    """A method's arguments, or a context: by name, or None."""
    if given is None:
        return
    if not isinstance(given, Mapping):
        raise wrong(what, given, "a mapping of names to values")
    for name in given:
        if not isinstance(name, str):
            raise wrong(what, name, "a name: the names in it must be texts")


def check_count(what: str, count: object, least: int, most: int, limit: str) -> None:
    """A whole number.

    Raises:
        ConfigError: It is none, or under the least.
        LimitExceeded: It is over `most`, the limit of that name.
    """
    if not isinstance(count, int) or isinstance(count, bool) or count < least:
        raise wrong(what, count, f"a whole number of at least {least}")
    if count > most:
        raise LimitExceeded(what, count, most, limit)


def check_callable(what: str, given: object) -> None:
    """Something to be called, or None."""
    if given is not None and not callable(given):
        raise wrong(what, given, "something that can be called")


def check_path(path: object) -> None:
    """A socket's path."""
    if not isinstance(path, str) or not path or "\0" in path:
        raise wrong("path", path, "the path of a daemon's socket")


def check_bytes(what: str, data: object) -> None:
    """Bytes, in any form that Python has for them."""
    if not isinstance(data, bytes | bytearray | memoryview):
        raise wrong(what, data, "bytes")
    if isinstance(data, memoryview) and not data.c_contiguous:
        raise wrong(what, data, "bytes that stand in a row: bytes(...) makes such")


AMethod = TypeVar("AMethod", bound=Callable[..., Any])


def raw(method: AMethod) -> AMethod:
    """Declares that a method takes bytes and returns bytes: `call_raw` calls it, and nobody else.

    @raw
    def store(self, data, name):
        return b""
    """
    return _marked(method, _RAW_MARK)


def quick(method: AMethod) -> AMethod:
    """Declares that a method never waits, and returns in less than a millisecond: what is answered
    before it may wait for it. The answers of quick methods that were asked together go out
    together.

    @quick
    def position(self):
        return self._position
    """
    return _marked(method, _QUICK_MARK)


def _marked(method: AMethod, mark: str) -> AMethod:
    function = getattr(method, "__func__", method)  # of a staticmethod, say
    setattr(function, mark, True)
    return method


def raw_methods(endpoint: object) -> frozenset[str]:
    """The names of an endpoint's methods that are declared `raw`."""
    return _methods_marked(endpoint, _RAW_MARK)


def quick_methods(endpoint: object) -> frozenset[str]:
    """The names of an endpoint's methods that are declared `quick`."""
    return _methods_marked(endpoint, _QUICK_MARK)


def _methods_marked(endpoint: object, mark: str) -> frozenset[str]:
    return frozenset(
        name for name, method in public_methods(endpoint) if getattr(method, mark, False)
    )


def check_endpoint(endpoint: object, *, is_async: bool = False) -> None:
    """An object whose public methods are to be served.

    Args:
        is_async: Its methods may be coroutines.

    Raises:
        ConfigError: It has no public method, or one that cannot be served. Which, and what to do.
    """
    if isinstance(endpoint, type):
        raise wrong("endpoint", endpoint, f"an object: did you mean {endpoint.__name__}()?")
    if isinstance(endpoint, _NO_ENDPOINTS):
        raise wrong("endpoint", endpoint, "an object with methods of its own")
    methods = dict(public_methods(endpoint))
    if not methods and not hasattr(type(endpoint), "__getattr__"):
        raise wrong("endpoint", endpoint, "an object with a public method: it has none")
    for name, method in methods.items():
        flags = _flags(method)
        if flags & _GENERATOR:
            raise ConfigError(f"endpoint: {name}", "yields; expected a method that returns")
        if flags & _COROUTINE and not is_async:
            problem = "is async def, and this Agent awaits nothing: use vchan.aio.Agent"
            raise ConfigError(f"endpoint: {name}", problem)


def public_methods(endpoint: object) -> Iterator[tuple[str, Callable[..., Any]]]:
    """What callers can name, as it is written down: no property is asked for its value."""
    own = getattr(endpoint, "__dict__", {})
    for name in dir(endpoint):
        if not name.startswith("_"):
            method = own[name] if name in own else getattr(type(endpoint), name, None)
            if callable(method):
                yield name, method


def _flags(method: Any) -> int:
    """Of the code that a call of it runs. What a wrapper makes of a coroutine is the wrapper's to
    say: it may well run it."""
    while hasattr(method, "func") and hasattr(method, "keywords"):  # a partial
        method = method.func
    if not hasattr(method, "__code__") and not hasattr(method, "__func__"):
        method = getattr(type(method), "__call__", None)  # noqa: B004 - the code is wanted
    code = getattr(getattr(method, "__func__", method), "__code__", None)
    return code.co_flags if code is not None else 0
