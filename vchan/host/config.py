"""The host daemon's configuration: oslo.config, as every OpenStack service has it."""

from __future__ import annotations

import re
import socket
from fnmatch import translate
from typing import Any, Final

from oslo_config import cfg
from oslo_log import log

from vchan import __version__
from vchan.errors import ConfigError
from vchan.host.domain_xml import Selection
from vchan.host.envelope import CONTEXT_ALLOW
from vchan.host.policy import Policy, parse
from vchan.messages import Topic

CONFIG_FILE: Final = "/etc/vchan/vchan.conf"
GROUP: Final = "vchan"
PROJECT: Final = "vchan"
"""Names the files that are read when none is named: /etc/vchan/vchan.conf and others."""

OPTIONS: Final = [
    cfg.StrOpt(
        "host",
        default=socket.gethostname(),
        sample_default="<this host's name>",
        help="Name of this host, as guests and other hosts' daemons are told it.",
    ),
    cfg.StrOpt("libvirt_uri", default="qemu:///system", help="The libvirt daemon to follow."),
    cfg.ListOpt(
        "select",
        default=[],
        help=(
            "The domains that get a channel attached: a list of *, name:GLOB, uuid:UUID, "
            "project:GLOB, user:GLOB, flavor:GLOB or image:GLOB. Domains whose XML has the "
            "channel are served anyway."
        ),
    ),
    cfg.StrOpt(
        "target_name",
        default="org.openstack.vchan.0",
        help="Target name of the virtio-serial channel.",
    ),
    cfg.StrOpt(
        "socket", default="/run/vchan/host.sock", help="Unix socket for programs on this host."
    ),
    cfg.StrOpt("socket_mode", default="0660", help="Permissions of that socket, octal."),
    cfg.ListOpt(
        "listen_topics",
        default=[],
        help=(
            "The topics that agents in guests may serve, as globs of TOPIC or EXCHANGE/TOPIC. "
            "None by default: with a broker, serving a topic means to receive its fanouts."
        ),
    ),
    cfg.ListOpt(
        "context_allow",
        default=sorted(CONTEXT_ALLOW),
        help=(
            "Keys of a caller's request context that may enter a guest; * for all. Tokens must "
            "not: a guest is its tenant's."
        ),
    ),
]


def load(arguments: list[str] | None) -> Any:
    """Parse the command line and configuration files.

    Raises:
        ConfigError: A value is wrong, or a file cannot be read.
    """
    conf = cfg.ConfigOpts()
    conf.register_opts(OPTIONS, GROUP)
    log.register_options(conf)
    try:
        conf(
            arguments,
            project=PROJECT,
            prog="vchan-host",
            version=f"vchan-host {__version__}",
        )
    except cfg.ConfigFilesNotFoundError as error:
        raise ConfigError(", ".join(error.config_files), "no such file, or not readable") from error
    except (cfg.Error, ValueError) as error:
        raise ConfigError("configuration", " ".join(str(error).split())) from error
    check(conf)
    return conf


def check(conf: Any) -> None:
    """Look at every option of ours now, not when it is first needed.

    Raises:
        ConfigError: Says which one, and what was expected.
    """
    for option in OPTIONS:
        try:
            conf[GROUP][option.name]
        except (cfg.Error, ValueError) as error:
            raise ConfigError(f"[{GROUP}] {option.name}", str(error)) from error
    socket_mode(conf)
    selection(conf)
    if not conf[GROUP].socket.startswith("/"):
        raise ConfigError(f"[{GROUP}] socket", f"{conf[GROUP].socket!r} is no absolute path")


def names_a_broker(conf: Any) -> bool:
    """Whether a transport_url is configured at all. oslo.messaging's default, a broker on this
    host, is not what a host without one means.

    The option is oslo.messaging's to register, and to import that takes a quarter of a second. So
    the same files are asked on their own.
    """
    files = cfg.ConfigOpts()
    files.register_opt(cfg.StrOpt("transport_url"))
    files(
        [],
        project=PROJECT,
        default_config_files=conf.config_file,
        default_config_dirs=conf.config_dir,
    )
    return files.transport_url is not None


def socket_mode(conf: Any) -> int:
    """The local socket's permissions."""
    text = conf[GROUP].socket_mode
    if not re.fullmatch(r"0?[0-7]{3}", text):
        raise ConfigError(f"[{GROUP}] socket_mode", f"{text!r} is no octal mode: try 0660")
    return int(text, 8)


def selection(conf: Any) -> Selection:
    """The domains that get a channel."""
    return Selection.parse(conf[GROUP].select, where=f"[{GROUP}] select")


def policy(conf: Any) -> Policy:
    """What guests may do."""
    lines = [f"listen,reply any {glob} allow" for glob in conf[GROUP].listen_topics]
    return parse([("listen_topics", "\n".join(lines))])


class TopicRule:
    """Which topics agents may serve.

    Args:
        globs: Of TOPIC or EXCHANGE/TOPIC.

    Raises:
        ConfigError: One of them is neither.
    """

    def __init__(self, globs: list[str]) -> None:
        for glob in globs:
            if not re.fullmatch(r"[^\s/#]+(/[^\s/#]+)?", glob):
                problem = f"{glob!r} is no glob of TOPIC or EXCHANGE/TOPIC"
                hint = " (a comment needs a line of its own)" if "#" in glob else ""
                raise ConfigError(f"[{GROUP}] listen_topics", problem + hint)
        self._patterns = [
            re.compile(translate(glob if "/" in glob else f"*/{glob}")) for glob in globs
        ]

    def __call__(self, topic: Topic) -> bool:
        name = f"{topic.exchange}/{topic.name}"
        return any(pattern.match(name) for pattern in self._patterns)


def list_opts() -> list[tuple[str, list[Any]]]:
    """For oslo-config-generator."""
    return [(GROUP, OPTIONS)]
