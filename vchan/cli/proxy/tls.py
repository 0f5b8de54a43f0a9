"""TLS on sockets that never wait, so that who speaks it is a socket like others to `Splices`."""

from __future__ import annotations

import errno
import socket
import ssl
from pathlib import Path
from typing import Any, Final

from vchan.errors import ConfigError

RECORD_BYTES_MAX: Final = 16 * 1024
"""Of plain bytes in one TLS record. Who reads at least as much leaves nothing in OpenSSL, where
nobody waits for it. At it: the sender begins another record."""


class TlsSocket(ssl.SSLSocket):
    """A non-blocking one: what would wait is a BlockingIOError, as with any other socket.

    Read RECORD_BYTES_MAX at least.
    """

    _has_ended = False

    def recv(self, buflen: int = RECORD_BYTES_MAX, flags: int = 0) -> bytes:
        """b"" means that the other side has ended what it says; some do that without TLS's word for
        it, so what must not be cut short says itself where it ends."""
        if self._has_ended:
            return b""
        try:
            return super().recv(buflen, flags)
        except ssl.SSLError as error:
            raise _as_any_sockets(error) from error

    def send(self, data: Any, flags: int = 0) -> int:
        """What was not taken is to be sent again, with nothing before it."""
        try:
            return super().send(data, flags)
        except ssl.SSLError as error:
            raise _as_any_sockets(error) from error

    def shutdown(self, how: int) -> None:
        """Say that nothing more comes."""
        if how != socket.SHUT_WR or self._has_ended:
            super().shutdown(how)
            return
        try:
            self.unwrap()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return  # it was said; the other side has not ended yet
        self._has_ended = True  # both have: what comes behind that is nobody's


def _as_any_sockets(error: ssl.SSLError) -> OSError:
    """What another socket would raise: the number of an SSLError is OpenSSL's, and means something
    else to everybody."""
    if isinstance(error, ssl.SSLWantReadError | ssl.SSLWantWriteError):
        return BlockingIOError()
    return OSError(errno.EPROTO, f"TLS: {error.reason}")


def server_context(
    certificate: str, key: str | None, clients_ca: str | None, *, needs_certificate: bool
) -> ssl.SSLContext:
    """What a server shows, and whose certificates it takes.

    Args:
        needs_certificate: A client without one is refused at once.

    Raises:
        ConfigError: A file is wrong.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # No session is resumed: each client shows who it is.
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET
    context.num_tickets = 0
    context.sslsocket_class = TlsSocket
    _require_there(certificate, key or certificate)
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(certificate, f"no certificate with its key: {error}") from error
    if clients_ca is not None:
        try:
            context.load_verify_locations(clients_ca)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(clients_ca, f"no CA's certificates: {error}") from error
        context.verify_mode = ssl.CERT_REQUIRED if needs_certificate else ssl.CERT_OPTIONAL
    return context


def _require_there(*paths: str) -> None:
    for path in paths:
        try:
            with Path(path).open("rb"):
                pass
        except OSError as error:
            raise ConfigError(path, f"cannot be read: {error.strerror or error}") from error
