"""What can go wrong, as exceptions.

    VchanError
    +-- ConfigError        a file or an option is wrong: fix it and start again
    +-- LimitExceeded      more than a named limit allows: nothing was queued
    +-- LinkError          the byte stream
    |   +-- PortAbsent     no such port or socket (yet)
    |   +-- PortBusy       somebody else has it open
    |   +-- PortDenied     permissions
    |   +-- NotAPort       the path is something else
    |   +-- LinkDown       not connected: nothing was queued
    +-- RequestError       a request failed
        +-- NoSuchDomain   this host has no such VM
        +-- NoSuchAgent    nobody serves that topic: the method has not run, and never will
        +-- NoSuchMethod   somebody serves it, but not that method: nothing has run
        +-- BadBody        the request's body is not what it should be: nothing has run
        +-- AgentGone      the agent went away, or its memory: the method may have run
        +-- CallTimeout    no answer in time: the method may have run
        +-- Rejected       refused on the way, with a reason: the method has not run
        +-- BadReply       the answer cannot be passed on: the method has run
        +-- RemoteError    the method ran and raised

Peers' faults on the wire are never exceptions: a session reports them as events.
Every message says what, where and what to do.
"""

from __future__ import annotations


class VchanError(Exception):
    """The root of everything vchan raises on purpose."""


class ConfigError(VchanError):
    """A configuration value is wrong.

    Args:
        where: The file, option or argument.
        problem: What is wrong with it, and what was expected.
    """

    def __init__(self, where: str, problem: str) -> None:
        self.where = where
        self.problem = problem
        super().__init__(f"{where}: {problem}")


class LimitExceeded(VchanError):
    """Something is larger or more than a limit allows. Nothing was queued.

    Args:
        what: What was measured, e.g. "message".
        size: What it came to.
        limit: What is allowed.
        name: The limit's name, as the documentation lists it.
    """

    def __init__(self, what: str, size: int, limit: int, name: str) -> None:
        self.what = what
        self.size = size
        self.limit = limit
        self.name = name
        super().__init__(f"{what}: {size} is over the limit of {limit} ({name})")


class LinkError(VchanError):
    """A byte stream could not be opened or used.

    Args:
        path: The port's or socket's path.
        problem: What is wrong, and what to do.
    """

    def __init__(self, path: str, problem: str) -> None:
        self.path = path
        self.problem = problem
        super().__init__(f"{path}: {problem}")


class PortAbsent(LinkError):
    """There is no such port or socket. It may appear later."""


class PortBusy(LinkError):
    """Another process has the port open. A virtio port has one opener."""


class PortDenied(LinkError):
    """This user may not open it."""


class NotAPort(LinkError):
    """The path is neither a character device nor a socket."""


class LinkDown(LinkError):
    """Not connected. Nothing was queued."""


class RequestError(VchanError):
    """A request did not succeed."""


class NoSuchDomain(RequestError):
    """This host has no such VM."""


class NoSuchAgent(RequestError):
    """Nobody serves that topic. The method has not run."""


class NoSuchMethod(RequestError):
    """The agent serves the topic but not that method, namespace or version."""


class BadBody(RequestError):
    """A request's body is not what it should be. The text says how."""


class AgentGone(RequestError):
    """The agent, or its VM, went away with the request, or with its memory of it. The method may
    have run."""


class CallTimeout(RequestError):
    """No answer in time. The method may have run."""


class Rejected(RequestError):
    """Refused on the way, with a reason. The method has not run."""


class BadReply(RequestError):
    """The agent's answer is too large, too deep or no JSON. The method has run."""


class RemoteError(RequestError):
    """The method ran and raised.

    Args:
        class_name: The exception's class, without its module.
        text: Its message.
        failure: The whole failure, as oslo.messaging serialises it (a JSON string).
    """

    def __init__(self, class_name: str, text: str, failure: str) -> None:
        self.class_name = class_name
        self.text = text
        self.failure = failure
        super().__init__(f"{class_name}: {text}" if text else class_name)
