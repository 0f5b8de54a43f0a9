"""The host daemon's configuration: oslo.config, as every OpenStack service has it."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from typing import Any, Final

from oslo_config import cfg

from vchan.errors import ConfigError
from vchan.host import config_files
from vchan.host.broker import config
from vchan.host.hypervisor.domain_xml import TARGET_NAME, Selection
from vchan.host.local.http_services import Service, parse_services
from vchan.host.oslo_wire.downward_envelope import CONTEXT_ALLOW
from vchan.host.policy import guest_context, rule_files
from vchan.host.policy.audit_log import AUDIT_LOG
from vchan.host.policy.rule_files import POLICY_DIR, topic_rules
from vchan.host.policy.rules import Policy
from vchan.host.vm.static_channels import StaticChannels, parse_channels, parse_topics
from vchan.io.access import Access, make_access
from vchan.rpc.messages import Topic
from vchan.wire.reserved_ports import reserved_for

GROUP: Final = "vchan"
TARGET_NAME_CHARS_MAX: Final = 64
"""The name is a file's in the guest, and ends the path of a socket on the host, of 107 bytes."""

_TARGET_NAME: Final = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{TARGET_NAME_CHARS_MAX - 1}}}")

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
            "project:GLOB, user:GLOB, flavor:GLOB, image:GLOB, extra-spec:NAME=GLOB or "
            "property:NAME=GLOB (these two of servers that nova 32 or later has started). Domains "
            "whose XML has the channel are served anyway."
        ),
    ),
    cfg.StrOpt(
        "target_name",
        default=TARGET_NAME,
        help=(
            "Target name of the virtio-serial channel: letters, digits, dots, hyphens, "
            "underscores. Two vchan-hosts on one host need two; names that others talk on, as "
            "org.qemu.guest_agent.0, are refused. Channels of the old name stay where they are: "
            "detach them before a change."
        ),
    ),
    cfg.StrOpt(
        "socket",
        default="/run/vchan/host.sock",
        help=(
            "Unix socket for programs on this host. A directory other than /run/vchan must be "
            "there."
        ),
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
            "from, and what is in it: how long a server may be off or shelved without losing "
            "casts; 0 for never. All hosts must have the same."
        ),
    ),
    cfg.IntOpt(
        "delete_queues_after",
        default=0,
        min=0,
        help=(
            "Seconds after a domain was undefined (and not migrated away) until those of its "
            "queues are deleted that are empty and that no host consumes from; 0 for never: the "
            "broker lets them expire. nova undefines a server that it shelves exactly as one "
            "that it deletes, and casts to a server without queues are lost."
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
        default=list(guest_context.CONTEXT_ALLOW),
        help=(
            "Keys of a guest's request context that pass into the control plane. Who the guest "
            "is, the host adds."
        ),
    ),
    cfg.ListOpt(
        "failure_modules",
        default=list(guest_context.FAILURE_MODULES),
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
    cfg.StrOpt(
        "reports_topic",
        default="",
        help=(
            "TOPIC or EXCHANGE/TOPIC of the notifications that tell services what guests report: "
            "event types vchan.guest.phase, vchan.guest.facts and vchan.guest.agents. Empty: "
            "nobody is told, and programs on the host ask."
        ),
    ),
    cfg.BoolOpt(
        "set_guest_time",
        default=False,
        help=(
            "Have a guest's clock set to this host's when the guest goes on after it was paused, "
            "saved or migrated, if it is a second or more beside it. The guest's daemon must allow "
            "set-time, and the policy that it replies."
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
    try:
        _check(conf)
    except ConfigError as error:
        raise config_files.located(error, conf) from None
    return conf


def _check(conf: Any) -> None:
    if not conf[GROUP].host.strip():
        raise ConfigError(f"[{GROUP}] host", "is empty; expected a name")
    target_name(conf)
    socket_mode(conf)
    client_access(conf)
    admin_access(conf)
    selection(conf)
    topic_rules(conf[GROUP].listen_topics)
    guest_context_allow(conf)
    failure_rule(conf)
    http_services(conf)
    static_channels(conf)
    reports_topic(conf)
    config_files.check_paths(conf, GROUP, ("socket", "policy_dir", "audit_log"))


def names_a_broker(conf: Any) -> bool:
    """Whether a transport_url is configured at all. oslo.messaging's default, a broker on this
    host, is not what a host without one means.

    The option is oslo.messaging's to register, and to import that takes a quarter of a second. So
    the same files are asked on their own.

    Raises:
        ConfigError: The value holds a $ that stands for nothing.
    """
    option = cfg.StrOpt("transport_url", secret=True)
    files = cfg.ConfigOpts()
    files.register_opt(option)
    files(
        [],
        project=config_files.PROJECT,
        default_config_files=conf.config_file,
        default_config_dirs=conf.config_dir,
    )
    return config_files.value(files, config_files.DEFAULT, option) is not None


def target_name(conf: Any) -> str:
    """The name of the channel, at both its ends.

    Raises:
        ConfigError: No port is called that, or others talk on it.
    """
    name: str = conf[GROUP].target_name
    where = f"[{GROUP}] target_name"
    if not name.strip():
        raise ConfigError(where, "is empty; expected a name")
    if not _TARGET_NAME.fullmatch(name):
        form = f"letters, digits, . - and _, at most {TARGET_NAME_CHARS_MAX}"
        raise ConfigError(where, f"{name!r} is no name of a port; expected {form}")
    owner = reserved_for(name)
    if owner:
        text = f"{name} is reserved for {owner}; expected a name of your own, as {TARGET_NAME}"
        raise ConfigError(where, text)
    return name


def static_channels(conf: Any) -> StaticChannels:
    """The channels that no VM stands behind."""
    options = conf[GROUP]
    return StaticChannels(
        parse_channels(options.channels, f"[{GROUP}] channels"),
        parse_topics(options.channel_topics, f"[{GROUP}] channel_topics"),
        socket_mode(conf),
    )


def reports_topic(conf: Any) -> Topic | None:
    """Where services hear of guests' reports; None: nowhere."""
    text = conf[GROUP].reports_topic.strip()
    return parse_topics([text], f"[{GROUP}] reports_topic")[0] if text else None


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
    """What stands in the files and is no section or option of anybody's: misspelt, perhaps.

    oslo.messaging's options are known only where there is need to: to import it takes a quarter of
    a second.
    """
    files = config_files.files_of(conf)
    known: dict[str, list[Any]] = {GROUP: list(OPTIONS)}
    for section, options in config_files.log_options():
        known.setdefault(section or config_files.DEFAULT, []).extend(options)
    others = ("vchan_conductor",)
    found = config_files.unknown_names(files, known, others)
    if any(f": [{GROUP}] " not in text for text in found):
        for section, options in config.messaging_options():
            known.setdefault(section or config_files.DEFAULT, []).extend(options)
    return config_files.bounded(config_files.unknown_names(files, known, others))


def policy(conf: Any) -> Policy:
    """What guests may do, as the files say now.

    Raises:
        ConfigError: Says which file and line, and what was expected.
    """
    return rule_files.load(conf[GROUP].policy_dir, conf[GROUP].listen_topics)


def guest_context_allow(conf: Any) -> frozenset[str]:
    """The context keys that guests may set."""
    where = f"[{GROUP}] guest_context_allow"
    return guest_context.check_allow(conf[GROUP].guest_context_allow, where)


def failure_rule(conf: Any) -> Callable[[str], bool]:
    """Whether callers may rebuild exceptions of a module."""
    return guest_context.module_rule(conf[GROUP].failure_modules, f"[{GROUP}] failure_modules")


def list_opts() -> list[tuple[str, list[Any]]]:
    """For oslo-config-generator."""
    return [(GROUP, OPTIONS)]
