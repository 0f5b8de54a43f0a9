"""A request that may pass goes on to its target, by oslo.messaging's own client.

What comes back is as it would be without a conductor: the result, or an exception of the same
class, module and message, less its traceback. Its arguments are not known here: they are the
message.
"""

from __future__ import annotations

import builtins
import threading
from collections.abc import Mapping
from typing import Any, Final

from vchan.conductor.admission import Handed
from vchan.errors import NoSuchAgent
from vchan.host.broker.config import import_oslo_messaging
from vchan.host.oslo_wire.upward_envelope import notification
from vchan.host.policy.rules import Ask, Kind

oslo_messaging: Final = import_oslo_messaging()[0]

SEND_RETRY: Final = 3
"""Attempts at a broker that is away. It holds up a thread meanwhile."""
_NOTIFICATION_VERSION: Final = 2.0
_REMOTE: Final = "_Remote"
"""What oslo.messaging puts behind the names of a rebuilt exception's class and module."""
_TRACEBACK: Final = "\nTraceback (most recent call last):"


class _NoModules(list[str]):
    """Instead of the modules whose exceptions may be rebuilt here: none may, and which one it was
    is remembered. An exception arrives in the thread that has called."""

    def __init__(self) -> None:
        super().__init__([""])  # an empty list would be replaced
        self._thread = threading.local()

    def __contains__(self, module: object) -> bool:
        self._thread.asked = module
        return False

    @property
    def asked(self) -> str:
        """The module of this thread's last exception."""
        return str(getattr(self._thread, "asked", ""))


class Forwarder:
    """Sends requests on.

    Args:
        url: The services' broker; None: `transport_url`.
    """

    def __init__(self, conf: Any, url: str | None = None) -> None:
        self._modules = _NoModules()
        self._transport = oslo_messaging.get_rpc_transport(
            conf, url=url, allowed_remote_exmods=self._modules
        )
        self._notifications = oslo_messaging.get_notification_transport(conf, url=url)

    def send(self, handed: Handed, context: Mapping[str, Any]) -> Any:
        """Pass it on. A call's result.

        Args:
            context: The whole context, as the target sees it.

        Raises:
            NoSuchAgent: Nobody serves the target.
            Exception: Whatever the target raised.
        """
        if handed.ask.kind is Kind.NOTIFY:
            return self._notify(handed, context)
        ask = handed.ask
        client = oslo_messaging.get_rpc_client(
            self._transport,
            _target(ask, handed.version),
            timeout=handed.timeout_s,
            call_monitor_timeout=handed.monitor_s,
            retry=SEND_RETRY,
            # Says so if there is no queue for it. A fanout without listeners is heard by nobody.
            transport_options=oslo_messaging.TransportOptions(at_least_once=not ask.fanout),
        )
        send = client.call if ask.kind is Kind.CALL else client.cast
        try:
            return send(dict(context), ask.method, **handed.args)
        except oslo_messaging.exceptions.MessageUndeliverable:
            where = f"{ask.exchange}/{ask.topic}" + (f" on {ask.server}" if ask.server else "")
            raise NoSuchAgent(f"nobody serves {where}") from None
        except Exception as error:  # noqa: BLE001  # whatever the target raised
            raise self._as_raised(error) from None

    def _as_raised(self, error: Exception) -> Exception:
        """What the target raised, less what oslo.messaging made of it on the way here."""
        if isinstance(error, oslo_messaging.RemoteError):
            return _exception(error.exc_type, self._modules.asked, error.value)
        kind = type(error)
        if kind.__module__ in (builtins.__name__, builtins.__name__ + _REMOTE):
            # Rebuilt whatever the modules, and its text has the traceback behind it.
            text, _, _ = str(error).partition(_TRACEBACK)
            name = kind.__name__.removesuffix(_REMOTE)
            return _exception(name, builtins.__name__, text.removesuffix("\n"))
        return error  # oslo.messaging's own

    def _notify(self, handed: Handed, context: Mapping[str, Any]) -> None:
        # Not by a Notifier: that has one exchange, and gives every message a new id.
        ask = handed.ask
        target = oslo_messaging.Target(exchange=ask.exchange, topic=f"{ask.topic}.{ask.method}")
        self._notifications._send_notification(
            target,
            dict(context),
            notification(handed.facts.uuid, ask.method, handed.args),
            version=_NOTIFICATION_VERSION,
            retry=SEND_RETRY,
        )

    def close(self) -> None:
        """Give the connections back."""
        self._transport.cleanup()
        self._notifications.cleanup()


def _target(ask: Ask, version: str | None) -> Any:
    return oslo_messaging.Target(
        exchange=ask.exchange,
        topic=ask.topic,
        server=ask.server or None,
        namespace=ask.namespace or None,
        version=version,
        fanout=ask.fanout or None,
    )


def _exception(name: str | None, module: str, text: str | None) -> Exception:
    """One that oslo.messaging's server serialises as that."""
    kind = type(str(name), (Exception,), {"__module__": module})
    made: Exception = kind(text or "")
    return made
