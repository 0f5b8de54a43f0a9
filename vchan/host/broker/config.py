"""Where the broker is, and how its clients declare things: oslo.messaging's own options."""

from __future__ import annotations

import logging
import re
import ssl
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from vchan.errors import ConfigError
from vchan.host.config_files import DEFAULT, check_type, check_types, files_of, value

LOG = logging.getLogger(__name__)

PREFETCH: Final = 64
"""Messages that the broker hands out for one VM and queue before they are acknowledged, unless
rabbit_qos_prefetch_count says otherwise. At it: the rest stays in the broker."""

RANGES: Final = {
    "heartbeat_rate": (0, 1000),  # looks at the clock
    "heartbeat_timeout_threshold": (0, 65535),  # seconds: AMQP has 16 bits for it
    "rabbit_interval_max": (1, 86_400),  # seconds: a day
    "rabbit_qos_prefetch_count": (0, 65535),  # AMQP has 16 bits for it
    "rabbit_quorum_max_memory_bytes": (0, 2**63 - 1),
    "rabbit_quorum_max_memory_length": (0, 2**63 - 1),
    "rabbit_retry_interval": (1, 86_400),
    "rabbit_transient_queues_ttl": (0, 2**31 - 1),  # seconds; over 49 days are 49 days
}
"""What AMQP and the broker take. oslo.messaging's own options are not always so narrow."""

OTHER_SCHEMES: Final = ("kafka", "fake", "zmq", "qpid", "http", "https", "amqps", "vchan")
"""What others' URLs begin with. Anything else in that place may be a part of a password."""
URL_FORM: Final = "rabbit://USER:PASSWORD@HOST:PORT/VHOST"
URL_ENCODING: Final = (
    "in user and password every character but letters, digits, - . _ and ~ must be percent-encoded "
    "(/ is %2F, @ is %40, # is %23, a comma %2C), an IPv6 address stands in [ ], and a port is a "
    "number"
)
HOST_CHARS_MAX: Final = 253
"""A host's name: DNS knows no longer ones."""
PORT_MAX: Final = 65535
"""TCP's."""
SHORT_BYTES_MAX: Final = 255
"""Of AMQP's short strings, as a virtual host's name."""

HONOURED: Final = (
    "amqp_auto_delete",
    "amqp_durable_queues",
    "heartbeat_rate",
    "heartbeat_timeout_threshold",
    "rabbit_interval_max",
    "rabbit_login_method",
    "rabbit_qos_prefetch_count",
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
        quorum_arguments: Of quorum queues, e.g. {"x-max-in-memory-length": 5}.
        fanout_expires_s: An unused fanout queue goes after this; 0: never.
        topic_expires_s: Likewise for topic queues.
        heartbeat_s: Silence after which a peer is asked; twice that and it is gone. 0: never.
        heartbeat_rate: Looks at the clock per half of that.
        retry_min_s, retry_max_s: Between attempts to connect, once all hosts have been tried.
        shuffle: Take the hosts in random order, not in the order given.
        prefetch: Unacknowledged messages per VM and queue.
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

    @classmethod
    def from_oslo(cls, conf: Any) -> BrokerConfig:
        """Read transport_url and [oslo_messaging_rabbit], as oslo.messaging does.

        Options in the URL's query go before the file's. docs/broker.md says which are not read.

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
        )


class _OsloOptions:
    """oslo.messaging's options, through its public names: TransportURL and opts.list_opts."""

    _GROUP = "oslo_messaging_rabbit"
    _QUORUM_LIMITS = (
        ("rabbit_quorum_max_memory_length", "x-max-in-memory-length"),
        ("rabbit_quorum_max_memory_bytes", "x-max-in-memory-bytes"),
    )

    def __init__(self, conf: Any) -> None:
        oslo_messaging, _ = import_oslo_messaging()
        self._options: dict[str, Any] = {}
        self._own: dict[str, Any] = {}
        for group, options in messaging_options():
            if group in (None, self._GROUP):
                conf.register_opts(options, group=group)
            if group == self._GROUP:
                self._options = {option.dest: option for option in options}
            if group is None:
                self._own = {option.dest: option for option in options}
        self._conf = conf
        known = [(self._GROUP, option) for option in self._options.values()]
        check_types(files_of(conf), known)
        self.url = read_url(value(conf, DEFAULT, self._own["transport_url"]), oslo_messaging, conf)

    def get(self, name: str, default: Any) -> Any:
        """The URL's value, else the file's, else (an older oslo.messaging) the default."""
        assert name in HONOURED
        option = self._options.get(name)
        if option is None:
            return default
        text = self.url.query.get(name)
        if text is None:
            where, found = f"[{self._GROUP}] {name}", value(self._conf, self._GROUP, option)
        else:
            where = f"transport_url's {name}"
            found = check_type(option, text, where)
        low, high = RANGES.get(name, (None, None))
        if low is not None and high is not None and not low <= found <= high:
            raise ConfigError(where, f"{found} is not a number from {low} to {high}")
        return found

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
        tls = BrokerTls(
            ca_file=self._file("ssl_ca_file"),
            cert_file=self._file("ssl_cert_file"),
            key_file=self._file("ssl_key_file"),
            check_hostname=self.get("ssl_enforce_hostname_verification", True),
        )
        self._check_tls(tls)
        return tls

    def _check_tls(self, tls: BrokerTls) -> None:
        """Python's ssl reads the files at the first connection, which is made in a thread; and for
        a key with a passphrase it would ask whoever sits at the terminal."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if tls.ca_file:
            try:
                context.load_verify_locations(tls.ca_file)
            except (ssl.SSLError, ValueError):
                where = f"[{self._GROUP}] ssl_ca_file"
                raise ConfigError(where, f"{tls.ca_file}: holds no certificate in PEM") from None
        if tls.cert_file:
            try:
                context.load_cert_chain(tls.cert_file, tls.key_file or None, password="")
            except (ssl.SSLError, ValueError, OSError):
                files = f"{tls.cert_file}, {tls.key_file or 'the same'}"
                problem = "expected a certificate and its key, in PEM, and no passphrase"
                where = f"[{self._GROUP}] ssl_cert_file"
                raise ConfigError(where, f"{files}: {problem}") from None

    def _file(self, name: str) -> str:
        """Looked at now: later, Python's ssl says only that some file is missing."""
        path: str = self.get(name, "")
        if path:
            try:
                Path(path).open("rb").close()
            except OSError as error:
                where = f"[{self._GROUP}] {name}"
                problem = f"{error.strerror}: expected a file that this user may read"
                raise ConfigError(where, f"{path}: {problem}") from error
        return path

    def login_method(self) -> str:
        method: str = self.get("rabbit_login_method", "AMQPLAIN")
        if method not in ("AMQPLAIN", "PLAIN", "EXTERNAL"):
            where = f"[{self._GROUP}] rabbit_login_method"
            raise ConfigError(where, f"{method!r} is not one of AMQPLAIN, PLAIN, EXTERNAL")
        return method

    def quorum_arguments(self) -> dict[str, int]:
        limits = {argument: self.get(name, 0) for name, argument in self._QUORUM_LIMITS}
        return {argument: limit for argument, limit in limits.items() if limit}


def messaging_options() -> list[tuple[str | None, list[Any]]]:
    """oslo.messaging's options, by section; None: [DEFAULT]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its modules warn of their own age
        return list(import_oslo_messaging()[1].list_opts())


def read_url(text: str | None, oslo_messaging: Any, conf: Any, where: str = "transport_url") -> Any:
    """A broker's address, as oslo.messaging reads it. Nothing of it is in what is said of it: it
    has a password.

    Raises:
        ConfigError: It is none; or oslo.messaging would read it as something else than was meant.
    """
    if not (text or "").strip():
        raise ConfigError(where, f"is empty; expected {URL_FORM}, or no such option at all")
    assert text is not None
    scheme, separator, rest = text.partition("://")
    if not separator or not scheme:
        raise ConfigError(where, f"does not begin with a scheme; expected {URL_FORM}")
    if scheme.removeprefix("kombu+") not in ("rabbit", "amqp"):
        shown = f"{scheme}://" if scheme in OTHER_SCHEMES else "its scheme"
        raise ConfigError(where, f"{shown} is not rabbit://; expected {URL_FORM}")
    try:
        url = oslo_messaging.TransportURL.parse(conf, text)
    except (oslo_messaging.InvalidTransportURL, ValueError):
        url = None
    if url is None or not _is_what_was_meant(url, rest):
        raise ConfigError(where, f"cannot be read; expected {URL_FORM}: {URL_ENCODING}")
    return url


def check_url(text: str | None, conf: Any, where: str = "transport_url") -> None:
    """The same, for who may have a broker of another kind, too."""
    if not text or text.startswith(("rabbit://", "kombu+")):
        read_url(text, import_oslo_messaging()[0], conf, where)


def _is_what_was_meant(url: Any, rest: str) -> bool:
    """Whether the characters that end a part of an URL can only have been meant to.

    Args:
        rest: All after "://".
    """
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    after = rest[len(authority) :]
    with_user = ["@" in part for part in authority.split(",")]
    return not (
        not rest.isprintable()  # Python's parser leaves out some of these
        or any(not _is_address(part.rpartition("@")[2]) for part in authority.split(","))
        or "#" in after  # nothing of ours stands behind one
        or ("@" in after and "@" not in authority)
        or any(part.count("@") > 1 for part in authority.split(","))
        or (any(with_user) and not with_user[0])  # a comma that did not part hosts
        or any(not _is_host(host.hostname, host.port) for host in url.hosts)
        or len((url.virtual_host or "").encode()) > SHORT_BYTES_MAX
        or "\0" in "".join(f"{host.username}{host.password}" for host in url.hosts)
    )


def _is_address(text: str) -> bool:
    """A host and a port, as far as colons and brackets go."""
    if "[" in text or "]" in text:
        return re.fullmatch(r"\[[^][]+\](:[^:]*)?", text) is not None
    return text.count(":") < 2


def _is_host(name: str | None, port: int | None) -> bool:
    if port is not None and not 0 < port <= PORT_MAX:
        return False
    if not name:
        return True
    try:
        name.encode("idna")
    except UnicodeError:
        return False
    return len(name) <= HOST_CHARS_MAX and re.fullmatch(r"[\w.:%-]+", name) is not None


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
