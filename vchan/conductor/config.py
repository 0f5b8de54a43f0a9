"""The conductor's configuration: oslo.config, as every OpenStack service has it."""

from __future__ import annotations

import socket
from typing import Any, Final

from oslo_config import cfg

from vchan.errors import ConfigError
from vchan.host import config_files
from vchan.host.broker.config import check_url, import_oslo_messaging, messaging_options
from vchan.host.policy import guest_context, rule_files
from vchan.host.policy.rules import Policy

GROUP: Final = "vchan_conductor"
PROGRAM: Final = "vchan-conductor"
"""Names the file that is read when none is named: /etc/vchan/vchan-conductor.conf, after
vchan.conf."""
POLICY_DIR: Final = "/etc/vchan/conductor.d"
AUDIT_LOG: Final = "/var/log/vchan/conductor-audit.log"

RABBIT: Final = "oslo_messaging_rabbit"
TAKEN_PER_THREAD: Final = 2
"""Requests taken from the broker, for each thread: one under way and one that waits for it."""

OPTIONS: Final = [
    cfg.StrOpt(
        "host",
        default=socket.gethostname(),
        sample_default="<this host's name>",
        help="Name of this conductor: the server's in its RPC target, and in the audit log.",
    ),
    cfg.StrOpt(
        "services_url",
        default="",
        secret=True,
        help=(
            "The transport_url of the services' broker, where that is not the one that the hosts "
            "of VMs are connected to (transport_url)."
        ),
    ),
    cfg.StrOpt(
        "policy_dir",
        default=POLICY_DIR,
        help="Directory of the files NN-name.policy, which say what may pass. None: nothing may.",
    ),
    cfg.StrOpt(
        "audit_log",
        default=AUDIT_LOG,
        help="File for one line of JSON a decision; - for standard error, and so journald.",
    ),
    cfg.IntOpt(
        "threads",
        default=64,
        min=2,
        max=1024,
        help="Requests handled at a time. A call takes one until it is answered.",
    ),
    cfg.IntOpt(
        "project_calls",
        default=16,
        min=1,
        help=(
            "Calls of one project, from all its VMs on all hosts, that wait for an answer at a "
            "time. Fewer than threads, or one project could take them all."
        ),
    ),
    cfg.FloatOpt(
        "project_requests_per_s",
        default=100.0,
        min=0.01,
        help=(
            "Requests of one project, from all its VMs on all hosts; a burst of two seconds' worth."
        ),
    ),
    cfg.ListOpt(
        "guest_context_allow",
        default=list(guest_context.CONTEXT_ALLOW),
        help="Keys of a guest's request context that pass. Who the guest is, its host has added.",
    ),
]


def load(arguments: list[str] | None, conf: Any = None) -> Any:
    """Parse the command line and configuration files.

    Args:
        conf: oslo.config's; None: new ones.

    Raises:
        ConfigError: A value is wrong, or a file cannot be read.
    """
    conf = conf or cfg.ConfigOpts()
    config_files.read(conf, OPTIONS, GROUP, arguments, PROGRAM)
    try:
        _check(conf)
    except ConfigError as error:
        raise config_files.located(error, conf) from None
    return conf


def _check(conf: Any) -> None:
    own = conf[GROUP]
    if own.project_calls >= own.threads:
        problem = f"{own.project_calls}; expected fewer than threads ({own.threads})"
        raise ConfigError(f"[{GROUP}] project_calls", problem)
    config_files.check_paths(conf, GROUP, ("policy_dir", "audit_log"))
    context_allow(conf)


def register_messaging(conf: Any) -> None:
    """oslo.messaging's own options, for the default below."""
    for group, options in import_oslo_messaging()[1].list_opts():
        if group in (None, RABBIT):
            conf.register_opts(options, group=group)
    # What waits for a thread waits with the broker, where it can still expire.
    waiting = conf[GROUP].threads * TAKEN_PER_THREAD
    conf.set_default("rabbit_qos_prefetch_count", waiting, RABBIT)


def check_urls(conf: Any) -> None:
    """Look at the brokers' addresses, as far as they are rabbit://: oslo.messaging takes some for
    what they are not.

    Raises:
        ConfigError: One is none.
    """
    by_name = {
        option.dest: option
        for section, options in messaging_options()
        if section is None
        for option in options
    }
    url = config_files.value(conf, config_files.DEFAULT, by_name["transport_url"])
    check_url(url, conf)
    check_url(conf[GROUP].services_url or url, conf, f"[{GROUP}] services_url")


def unknown_names(conf: Any) -> list[str]:
    """What stands in the files and is no section or option of anybody's: misspelt, perhaps."""
    known: dict[str, list[Any]] = {GROUP: list(OPTIONS)}
    for section, options in (*config_files.log_options(), *messaging_options()):
        known.setdefault(section or config_files.DEFAULT, []).extend(options)
    files = config_files.files_of(conf)
    return config_files.bounded(config_files.unknown_names(files, known, ("vchan",)))


def policy(conf: Any) -> Policy:
    """What may pass, as the files say now.

    Raises:
        ConfigError: Says which file and line, and what was expected.
    """
    return rule_files.load(conf[GROUP].policy_dir)


def context_allow(conf: Any) -> frozenset[str]:
    """The context keys that guests may set."""
    where = f"[{GROUP}] guest_context_allow"
    return guest_context.check_allow(conf[GROUP].guest_context_allow, where)


def list_opts() -> list[tuple[str, list[Any]]]:
    """For oslo-config-generator."""
    return [(GROUP, OPTIONS)]
