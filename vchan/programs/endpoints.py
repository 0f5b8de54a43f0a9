"""What programs hand in to be served, checked."""

from typing import Any, NamedTuple

from vchan.rpc.arguments import (
    check_endpoint,
    check_name,
    check_optional_name,
    check_topic,
    check_version,
    quick_methods,
    raw_methods,
)
from vchan.rpc.messages import Topic


class Endpoint(NamedTuple):
    """An object whose methods are served."""

    methods: Any
    namespace: str | None
    version: str
    raw: frozenset[str]
    """The names of those that take bytes."""
    quick: frozenset[str]
    """The names of those that never wait."""


def endpoint_of(
    topic: str,
    methods: object,
    exchange: str,
    namespace: str | None,
    version: str,
    *,
    is_async: bool = False,
) -> tuple[Topic, Endpoint]:
    """A topic and what serves it, of a program's arguments.

    Args:
        is_async: Methods may be coroutines.

    Raises:
        ConfigError: One of them is wrong: which, and what was expected.
    """
    check_topic(topic)
    check_name("exchange", exchange)
    check_optional_name("namespace", namespace)
    check_version(version)
    check_endpoint(methods, is_async=is_async)
    endpoint = Endpoint(methods, namespace, version, raw_methods(methods), quick_methods(methods))
    return Topic(exchange, topic), endpoint
