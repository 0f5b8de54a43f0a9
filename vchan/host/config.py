"""The host daemon's configuration: oslo.config, as every OpenStack service has it."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

from oslo_config import cfg

from vchan.access import Access, make_access
from vchan.errors import ConfigError
from vchan.host import config_files, identity, policy_files
from vchan.host.audit import AUDIT_LOG
from vchan.host.domain_xml import Selection
from vchan.host.envelope import CONTEXT_ALLOW
from vchan.host.http_proxy import Service, parse_services
from vchan.host.policy import Policy
from vchan.host.policy_files import POLICY_DIR, topic_rules
from vchan.host.static_channels import StaticChannels, parse_channels, parse_topics

CONFIG_FILE: Final = "/etc/vchan/vchan.conf"
GROUP: Final = "vchan"

OPTIONS: Final = [
    cfg.StrOpt(
        "host",
        default=socket.gethostname(),
        sample_default="<this host's name>",
        help="Name of this host, as guests and other hosts' daemons are told it.",
    ),
    cfg.StrOpt(
        "libvirt_uri",
        default="qemu:///system",
        help="The libvirt daemon to follow. Empty: none, the channels option's are all there are.",
    ),
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
        "client_groups",
        default=[],
        help=(
            "The groups whose members may connect to it, besides root and this daemon's user. "
            "None: whoever may open it."
        ),
    ),
    cfg.ListOpt(
        "admin_groups",
        default=[],
        help=(
            "The groups whose members may attach, detach and release VMs there, besides root and "
            "this daemon's user."
        ),
    ),
    cfg.ListOpt(
        "listen_topics",
        default=[],
        help=(
            "The topics that agents in guests may serve and answer on, as globs of TOPIC or "
            "EXCHANGE/TOPIC: rules that come after those of policy_dir. None by default: with a "
            "broker, serving a topic means to receive its fanouts."
        ),
    ),
    cfg.IntOpt(
        "queues_expire_after",
        default=7 * 24 * 3600,
        min=0,
        max=49 * 24 * 3600,
        help=(
            "Seconds after which the broker deletes a VM's topic queue that no host has consumed "
            "from, and what is in it; 0 for never. All hosts must have the same."
        ),
    ),
    cfg.IntOpt(
        "delete_queues_after",
        default=600,
        min=0,
        help=(
            "Seconds after a domain was undefined (and not migrated away) until those of its "
            "queues are deleted that are empty and that no host consumes from; 0 for never."
        ),
    ),
    cfg.StrOpt(
        "policy_dir",
        default=POLICY_DIR,
        help="Directory of the files NN-name.policy, which say what guests may do.",
    ),
    cfg.StrOpt(
        "audit_log",
        default=AUDIT_LOG,
        help="File for one line of JSON a decision; - for standard error, and so journald.",
    ),
    cfg.ListOpt(
        "guest_context_allow",
        default=list(identity.CONTEXT_ALLOW),
        help=(
            "Keys of a guest's request context that pass into the control plane. Who the guest "
            "is, the host adds."
        ),
    ),
    cfg.ListOpt(
        "failure_modules",
        default=list(identity.FAILURE_MODULES),
        help=(
            "Modules, as globs, whose exceptions callers may rebuild from an agent's answer, if "
            "their own allowed_remote_exmods has them. Others arrive as RemoteError, with the text."
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
    cfg.ListOpt(
        "channels",
        default=[],
        help=(
            "Channels besides those of VMs, to another vchan-host on this machine: a list of "
            "NAME=connect:/PATH or NAME=listen:/PATH; and NAME=pipe:/PATH, to a vchan-guest that "
            "reads there. NAME stands where a VM's UUID does."
        ),
    ),
    cfg.ListOpt(
        "channel_topics",
        default=[],
        help=(
            "What is served at this side's broker, told to the other end of the channels option's "
            "channels: a list of TOPIC or EXCHANGE/TOPIC."
        ),
    ),
    cfg.ListOpt(
        "http_services",
        default=[],
        help=(
            "HTTP services that guests may ask over the channel, as far as the policy has rules of "
            "kind http: a list of NAME=http://HOST[:PORT][/PATH], or https."
        ),
    ),
    cfg.StrOpt(
        "metadata_proxy_shared_secret",
        default="",
        secret=True,
        help=(
            "As in nova's [neutron] section: with it requests to http_services are signed, so that "
            "nova's metadata service takes them."
        ),
    ),
]


def load(arguments: list[str] | None) -> Any:
    """Parse the command line and configuration files.

    Raises:
        ConfigError: A value is wrong, or a file cannot be read.
    """
    conf = cfg.ConfigOpts()
    config_files.read(conf, OPTIONS, GROUP, arguments, "vchan-host")
    _check(conf)
    return conf


def _check(conf: Any) -> None:
    for name in ("host", "target_name"):
        if not conf[GROUP][name].strip():
            raise ConfigError(f"[{GROUP}] {name}", "is empty; expected a name")
    socket_mode(conf)
    client_access(conf)
    admin_access(conf)
    selection(conf)
    topic_rules(conf[GROUP].listen_topics)
    guest_context_allow(conf)
    failure_rule(conf)
    http_services(conf)
    static_channels(conf)
    config_files.check_paths(conf, GROUP, ("socket", "policy_dir", "audit_log"))


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
        project=config_files.PROJECT,
        default_config_files=conf.config_file,
        default_config_dirs=conf.config_dir,
    )
    return files.transport_url is not None


def static_channels(conf: Any) -> StaticChannels:
    """The channels that no VM stands behind."""
    options = conf[GROUP]
    return StaticChannels(
        parse_channels(options.channels, f"[{GROUP}] channels"),
        parse_topics(options.channel_topics, f"[{GROUP}] channel_topics"),
        socket_mode(conf),
    )


def http_services(conf: Any) -> dict[str, Service]:
    """The HTTP services that guests may ask, by name."""
    return parse_services(conf[GROUP].http_services, f"[{GROUP}] http_services")


def socket_mode(conf: Any) -> int:
    """The local socket's permissions."""
    text = conf[GROUP].socket_mode
    if not re.fullmatch(r"0?[0-7]{3}", text):
        raise ConfigError(f"[{GROUP}] socket_mode", f"{text!r} is no octal mode: try 0660")
    return int(text, 8)


def client_access(conf: Any) -> Access | None:
    """Who may connect to the local socket; None: whoever may open it."""
    groups = conf[GROUP].client_groups
    if not groups:
        return None
    return make_access((), (*groups, *conf[GROUP].admin_groups), "", f"[{GROUP}] client_groups")


def admin_access(conf: Any) -> Access:
    """Who may administer through it."""
    return make_access((), conf[GROUP].admin_groups, "", f"[{GROUP}] admin_groups")


def selection(conf: Any) -> Selection:
    """The domains that get a channel."""
    return Selection.parse(conf[GROUP].select, where=f"[{GROUP}] select")


def unknown_options(conf: Any) -> list[str]:
    """What stands in our section of the files and is no option: a misspelt one, perhaps.

    oslo.config takes no notice of such.
    """
    known = {option.dest for option in OPTIONS}
    found = []
    for path in _files(conf):
        sections: dict[str, dict[str, list[str]]] = {}
        cfg.ConfigParser(str(path), sections).parse()
        for name in sections.get(GROUP, {}):
            if name.replace("-", "_") not in known:
                close = get_close_matches(name, known, 1)
                hint = f": perhaps {close[0]} is meant" if close else ""
                found.append(f"{path}: [{GROUP}] {name} is no option{hint}")
    return found


def _files(conf: Any) -> list[Path]:
    directories = [Path(each) for each in conf.config_dir or ()]
    snippets = [path for each in directories for path in sorted(each.glob("*.conf"))]
    return [*(Path(each) for each in conf.config_file or ()), *snippets]


def policy(conf: Any) -> Policy:
    """What guests may do, as the files say now.

    Raises:
        ConfigError: Says which file and line, and what was expected.
    """
    return policy_files.load(conf[GROUP].policy_dir, conf[GROUP].listen_topics)


def guest_context_allow(conf: Any) -> frozenset[str]:
    """The context keys that guests may set."""
    where = f"[{GROUP}] guest_context_allow"
    return identity.check_allow(conf[GROUP].guest_context_allow, where)


def failure_rule(conf: Any) -> Callable[[str], bool]:
    """Whether callers may rebuild exceptions of a module."""
    return identity.module_rule(conf[GROUP].failure_modules, f"[{GROUP}] failure_modules")


def list_opts() -> list[tuple[str, list[Any]]]:
    """For oslo-config-generator."""
    return [(GROUP, OPTIONS)]
