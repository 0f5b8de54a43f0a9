"""Where the broker is, and how its clients declare things: oslo.messaging's own options."""

from __future__ import annotations

import logging
import ssl
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from vchan.errors import ConfigError

LOG = logging.getLogger(__name__)

PREFETCH: Final = 64

HONOURED: Final = (
    "amqp_auto_delete",
    "amqp_durable_queues",
    "heartbeat_rate",
    "heartbeat_timeout_threshold",
    "rabbit_interval_max",
    "rabbit_login_method",
    "rabbit_qos_prefetch_count",
    "rabbit_quorum_delivery_limit",
    "rabbit_quorum_max_memory_bytes",
    "rabbit_quorum_max_memory_length",
    "rabbit_quorum_queue",
    "rabbit_retry_interval",
    "rabbit_transient_queues_ttl",
    "rabbit_transient_quorum_queue",
    "ssl",
    "ssl_ca_file",
    "ssl_cert_file",
    "ssl_enforce_hostname_verification",
    "ssl_key_file",
)
"""The options in [oslo_messaging_rabbit] that are read, and no others."""


@dataclass(frozen=True, slots=True)
class BrokerHost:
    """One node of the broker."""

    name: str
    port: int = 5672
    user: str = "guest"
    password: str = field(default="guest", repr=False)

    @property
    def address(self) -> str:
        """NAME:PORT, an IPv6 address in brackets."""
        return f"[{self.name}]:{self.port}" if ":" in self.name else f"{self.name}:{self.port}"


@dataclass(frozen=True, slots=True)
class BrokerTls:
    """Without `ca_file` the system's authorities count, and host names are not checked."""

    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    check_hostname: bool = True

    def options(self, host: BrokerHost) -> dict[str, Any] | bool:
        """py-amqp's `ssl` argument."""
        options: dict[str, Any] = {}
        if self.key_file:
            options["keyfile"] = self.key_file
        if self.cert_file:
            options["certfile"] = self.cert_file
        if self.ca_file:
            options["ca_certs"] = self.ca_file
            options["cert_reqs"] = ssl.CERT_REQUIRED
            if self.check_hostname:
                options["server_hostname"] = host.name
        return options or True


@dataclass(frozen=True, slots=True)
class BrokerConfig:
    """Where the broker is, and how its clients declare things.

    Args:
        durable, auto_delete: Of the topics' exchanges: oslo's amqp_durable_queues (or
            rabbit_quorum_queue) and amqp_auto_delete. An exchange that exists is taken as it is.
        quorum: The VMs' topic queues are quorum queues. They are durable in any case.
        fanout_quorum: Likewise for fanout: oslo's rabbit_transient_quorum_queue.
        quorum_arguments: Of quorum queues, e.g. {"x-delivery-limit": 5}.
        fanout_expires_s: An unused fanout queue goes after this; 0: never.
        topic_expires_s: Likewise for topic queues.
        heartbeat_s: Silence after which a peer is asked; twice that and it is gone. 0: never.
        heartbeat_rate: Looks at the clock per half of that.
        retry_min_s, retry_max_s: Between attempts to connect, once all hosts have been tried.
        shuffle: Take the hosts in random order, not in the order given.
        prefetch: Unacknowledged messages per VM and queue.
        default_exchange: oslo's control_exchange, for targets that name none.
    """

    hosts: tuple[BrokerHost, ...]
    virtual_host: str = "/"
    tls: BrokerTls | None = None
    login_method: str = "AMQPLAIN"
    heartbeat_s: int = 60
    heartbeat_rate: int = 3
    durable: bool = False
    auto_delete: bool = False
    quorum: bool = False
    fanout_quorum: bool = False
    quorum_arguments: Mapping[str, int] = field(default_factory=dict)
    fanout_expires_s: int = 1800
    topic_expires_s: int = 0
    retry_min_s: float = 1.0
    retry_max_s: float = 30.0
    shuffle: bool = False
    prefetch: int = PREFETCH
    default_exchange: str = "openstack"

    @classmethod
    def from_oslo(cls, conf: Any) -> BrokerConfig:
        """Read transport_url, control_exchange and [oslo_messaging_rabbit], as oslo.messaging does.

        Options in the URL's query go before the file's. docs/host.md says which are not read.

        Args:
            conf: An oslo.config ConfigOpts. oslo.messaging's options are registered on it.

        Raises:
            ConfigError: The URL is not one of RabbitMQ's, or an option is wrong.
        """
        options = _OsloOptions(conf)
        quorum = bool(options.get("rabbit_quorum_queue", False))
        return cls(
            hosts=options.hosts(),
            virtual_host=options.url.virtual_host or "/",
            tls=options.tls(),
            login_method=options.login_method(),
            heartbeat_s=options.get("heartbeat_timeout_threshold", 60),
            heartbeat_rate=max(1, options.get("heartbeat_rate", 3)),
            durable=quorum or bool(options.get("amqp_durable_queues", False)),
            auto_delete=options.get("amqp_auto_delete", False),
            quorum=quorum,
            fanout_quorum=options.get("rabbit_transient_quorum_queue", False),
            quorum_arguments=options.quorum_arguments(),
            fanout_expires_s=options.get("rabbit_transient_queues_ttl", 1800),
            retry_min_s=options.get("rabbit_retry_interval", 1),
            retry_max_s=options.get("rabbit_interval_max", 30),
            shuffle=len(options.url.hosts) > 1,  # as oslo.messaging does, whatever the strategy
            prefetch=options.get("rabbit_qos_prefetch_count", 0) or PREFETCH,
            default_exchange=conf.control_exchange,
        )


class _OsloOptions:
    """oslo.messaging's options, through its public names: TransportURL and opts.list_opts."""

    _GROUP = "oslo_messaging_rabbit"
    _QUORUM_LIMITS = (
        ("rabbit_quorum_delivery_limit", "x-delivery-limit"),
        ("rabbit_quorum_max_memory_length", "x-max-in-memory-length"),
        ("rabbit_quorum_max_memory_bytes", "x-max-in-memory-bytes"),
    )

    def __init__(self, conf: Any) -> None:
        oslo_messaging, oslo_messaging_opts = import_oslo_messaging()
        self._types: dict[str, Any] = {}
        for group, options in oslo_messaging_opts.list_opts():
            if group in (None, self._GROUP):
                conf.register_opts(options, group=group)
            if group == self._GROUP:
                self._types = {option.dest: option.type for option in options}
        try:
            self.url = oslo_messaging.TransportURL.parse(conf)
        except oslo_messaging.InvalidTransportURL as error:
            # The URL has a password in it: what is said of it goes into logs.
            raise ConfigError("transport_url", str(error).replace(error.url, "...")) from error
        except ValueError as error:  # a port that is no number
            raise ConfigError("transport_url", str(error)) from error
        if self.url.transport.removeprefix("kombu+") not in ("rabbit", "amqp"):
            raise ConfigError("transport_url", f"{self.url.transport}:// is not rabbit://")
        self._values = conf[self._GROUP]

    def get(self, name: str, default: Any) -> Any:
        """The URL's value, else the file's, else (an older oslo.messaging) the default."""
        assert name in HONOURED
        if name not in self._types:
            return default
        text = self.url.query.get(name)
        where = f"[{self._GROUP}] {name}" if text is None else f"transport_url's {name}"
        try:
            return self._values[name] if text is None else self._types[name](text)
        except ValueError as error:
            raise ConfigError(where, " ".join(str(error).split())) from error

    def hosts(self) -> tuple[BrokerHost, ...]:
        return tuple(
            BrokerHost(
                name=host.hostname or "localhost",
                port=host.port or 5672,
                user=host.username or "guest",
                password=host.password or "guest",
            )
            for host in self.url.hosts
        ) or (BrokerHost("localhost"),)

    def tls(self) -> BrokerTls | None:
        if not self.get("ssl", False):
            return None
        return BrokerTls(
            ca_file=self._file("ssl_ca_file"),
            cert_file=self._file("ssl_cert_file"),
            key_file=self._file("ssl_key_file"),
            check_hostname=self.get("ssl_enforce_hostname_verification", True),
        )

    def _file(self, name: str) -> str:
        """Looked at now: later, Python's ssl says only that some file is missing."""
        path: str = self.get(name, "")
        if path:
            try:
                Path(path).open("rb").close()
            except OSError as error:
                where = f"[{self._GROUP}] {name}"
                raise ConfigError(where, f"{path}: {error.strerror}") from error
        return path

    def login_method(self) -> str:
        method: str = self.get("rabbit_login_method", "AMQPLAIN")
        if method not in ("AMQPLAIN", "PLAIN", "EXTERNAL"):
            raise ConfigError("rabbit_login_method", f"{method}: py-amqp does not know it")
        return method

    def quorum_arguments(self) -> dict[str, int]:
        limits = {argument: self.get(name, 0) for name, argument in self._QUORUM_LIMITS}
        return {argument: limit for argument, limit in limits.items() if limit}


def import_oslo_messaging() -> tuple[Any, Any]:
    """oslo_messaging and its opts. Late, because it takes a quarter of a second, and without
    eventlet where that can be.

    oslo.messaging imports oslo.service, which picks its eventlet backend unless told otherwise. Its
    threading backend needs cotyledon (`oslo.service[threading]`) and leaves eventlet alone; but
    futurist, which both use, imports eventlet wherever it is installed: another quarter of a second
    and 10 MiB for nothing. Where the threading backend is missing eventlet is imported; it patches
    nothing.
    """
    if find_spec("cotyledon") is None:
        return _oslo_messaging()
    with _hidden("eventlet"):
        try:
            backend = import_module("oslo_service.backend")
            if backend.get_backend_type() is None:
                backend.init_backend(backend.BackendType.THREADING)
        except (ImportError, AttributeError, ValueError) as error:
            LOG.debug("oslo.service has no threading backend here: %s", error)
        else:
            return _oslo_messaging()
    return _oslo_messaging()


def _oslo_messaging() -> tuple[Any, Any]:
    import oslo_messaging
    import oslo_messaging.opts

    return oslo_messaging, oslo_messaging.opts


@contextmanager
def _hidden(name: str) -> Iterator[None]:
    """A module that is not there, unless it is imported already."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # import's own word for "not there"
    try:
        yield
    finally:
        del sys.modules[name]
