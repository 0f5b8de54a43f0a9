"""What a domain's XML says about its channel, and the XML that gives it one.

Rules of this file
1. No I/O. XML comes from libvirtd, which we trust, but only in the shape it documents:
   anything else is a `DomainXmlError`, never a guess. It is read by a parser and nothing else: what
   stands in its texts is others' and may look like anything.
2. The socket's path is read from the live XML, never built: libvirt puts a number into it that
   changes at every start, restore, revert and migration.
"""

from __future__ import annotations

import enum
import fnmatch
import hashlib
import ipaddress
import re
import types
import uuid as uuids
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn
from xml.etree import ElementTree
from xml.parsers import expat
from xml.sax import saxutils

from vchan.errors import ConfigError, LimitExceeded, VchanError

# The channel's name: inside the guest it is /dev/virtio-ports/<TARGET_NAME>.
TARGET_NAME = "org.openstack.vchan.0"

# libvirt keeps aliases that begin with "ua-" in live and next-boot XML alike; only by such an
# alias can one call detach a channel from both. This is the alias of a channel of that name; others
# have others (`alias_of`), for an alias can be given only once in a domain.
ALIAS = "ua-vchan0"

ALIAS_NAME_CHARS_MAX = 40
"""Of the channel's name in its alias: libvirt takes letters, digits, - and _ there, however many.
At it: the rest is cut; a digest tells them apart."""
XML_CHARS_MAX = 4 * 1024 * 1024
"""Of a domain: libvirt itself refuses XML over 10 MB, and one with hundreds of devices stays below
200 kB. At it: the domain counts as one that cannot be read."""

NOVA_NAMESPACES = (
    "http://openstack.org/xmlns/libvirt/nova/1.1",
    "http://openstack.org/xmlns/libvirt/nova/1.0",
)

METADATA_KEYS = ("project", "user", "flavor", "image", "name", "project_name", "user_name")
"""project, user and image are ids; the names are what people know them by. The server's and the
project's are other people's choice: nothing is decided by them."""

METADATA_CHARS_MAX = 255
"""Of each of them: nova's own limit. At it: the rest is cut."""

EXTRA_SPEC = "extra-spec"
PROPERTY = "property"
LABEL_KINDS = (EXTRA_SPEC, PROPERTY)
"""What nova writes of a server since its release 32 (2025.2): the flavor's extra specs, and those
of the image's properties that nova knows. A label is called KIND:NAME."""

ADDRESSES_MAX = 64
"""Of one domain, fixed and floating. At it: the others are left out, and the domain is not found by
them."""

LABELS_MAX = 128
"""Of one domain. At it: the others are left out, and no rule matches them."""
LABEL_BYTES_MAX = 255
"""Of a label's name, and of its value: nova's own limit. At it: the label is left out, for a part
of it could match what it is not."""

# nova boots a rescue image from a disk of this name, whatever its images_type: a file of the
# instance's directory, or a logical volume or an image of Ceph's that is called UUID_disk.rescue.
# The rest of the domain (UUID, name, metadata with the server's own image) stays as it was.
NOVA_RESCUE_DISK = "disk.rescue"


class DomainXmlError(VchanError):
    """A domain's XML is not what libvirt documents."""


class DomainState(enum.Enum):
    """Whether the guest executes. PAUSED includes a domain that is still migrating in."""

    RUNNING = "running"
    PAUSED = "paused"
    SHUTOFF = "shut off"
    UNKNOWN = "unknown"  # libvirt has the domain, and it could not be read


@dataclass(frozen=True, slots=True)
class DomainFacts:
    """One domain as libvirt describes it now.

    Attributes:
        incoming: Paused because a migration into this host is under way.
        outgoing: Paused because a migration to another host is switching over (or has).
        channel_path: The live channel's socket, None if there is no live channel.
        has_controller: The live XML has a virtio-serial controller, so a channel can be plugged.
        configured: The channel is in the next-boot XML.
        persistent: There is next-boot XML.
        has_own_port: The XML has a virtio-serial device that nobody has attached, so whoever
            writes the definition anew writes it again, and libvirt gives it a controller.
        rescued: nova has another image running in the server's place, under its identity.
        note: What an operator should know of how this was read; '' if nothing.
        metadata: What nova wrote, by METADATA_KEYS; '' where it wrote nothing.
        labels: The same of LABEL_KINDS, by KIND:NAME; None: it has not, for it is too old.
        addresses: That nova has given the server's ports, in their shortest form; of networks that
            know nothing of each other, so others' servers may have the same.
    """

    uuid: str
    name: str
    state: DomainState
    incoming: bool = False
    outgoing: bool = False
    channel_path: str | None = None
    has_controller: bool = False
    configured: bool = False
    persistent: bool = False
    has_own_port: bool = False
    rescued: bool = False
    note: str = ""
    metadata: Mapping[str, str] = field(
        default_factory=lambda: types.MappingProxyType(dict.fromkeys(METADATA_KEYS, ""))
    )
    labels: Mapping[str, str] | None = None
    addresses: tuple[str, ...] = ()

    @property
    def active(self) -> bool:
        return self.state is not DomainState.SHUTOFF

    @property
    def is_novas(self) -> bool:
        """Whether nova has made it, and makes its definition anew at each start."""
        return any(self.metadata.values())

    @property
    def will_lose_channel(self) -> bool:
        """Whether nova's next definition is one in which no channel can be plugged: the controller
        is there only because a channel was attached to the definition before this one's start."""
        is_there = self.active and self.served_path is not None
        return is_there and self.is_novas and not self.has_own_port

    @property
    def served_path(self) -> str | None:
        """Of the channel that is to be connected to: none in rescue, for who is there is not who
        requests to the server are meant for."""
        return None if self.rescued else self.channel_path


class ChannelElement(NamedTuple):
    """A channel as it stands in one XML of a domain's.

    Attributes:
        alias: None where it has none; next-boot XML has only those that users gave.
        xml: The element, by which libvirt finds it again in the same definition.
    """

    alias: str | None
    xml: str

    @property
    def has_own_alias(self) -> bool:
        """One that a user gave: libvirt keeps it in the live and the next-boot XML alike."""
        return self.alias is not None and self.alias.startswith("ua-")


def domain_facts(
    current_xml: str,
    next_boot_xml: str | None,
    *,
    state: DomainState,
    incoming: bool = False,
    outgoing: bool = False,
    target_name: str = TARGET_NAME,
    note: str = "",
) -> DomainFacts:
    """Read a domain's facts.

    Args:
        current_xml: XMLDesc(0): live XML if the domain is active, next-boot XML otherwise.
        next_boot_xml: XMLDesc(INACTIVE), or None for a transient domain.
        state: As libvirt gives it, read after the XML. XML without an id is of a domain that
            is shut off, whatever this says.

    Raises:
        DomainXmlError: Not a domain, or without a uuid or name.
        LimitExceeded: Over XML_CHARS_MAX.
    """
    root = _parse(current_xml)
    # The XML and the state were read one after the other: it is active if both say so.
    active = root.get("id") is not None and state is not DomainState.SHUTOFF
    next_root = None if next_boot_xml is None else _parse(next_boot_xml)
    return DomainFacts(
        uuid=_uuid(root),
        name=_required_text(root, "name"),
        state=state if active else DomainState.SHUTOFF,
        incoming=active and incoming,
        outgoing=active and outgoing,
        channel_path=_channel_path(root, target_name) if active else None,
        has_controller=active and _has_controller(root),
        configured=next_root is not None and _find_element(next_root, target_name) is not None,
        persistent=next_root is not None,
        has_own_port=_has_own_port(root),
        rescued=_is_rescued(root),
        note=note,
        metadata=_nova_metadata(root),
        labels=_nova_labels(root),
        addresses=_nova_addresses(root),
    )


def alias_of(target_name: str) -> str:
    """The alias that we give a channel of this name: of two names, one each."""
    if target_name == TARGET_NAME:
        return ALIAS
    readable = re.sub(r"[^A-Za-z0-9_]+", "-", target_name)[:ALIAS_NAME_CHARS_MAX]
    return f"ua-{readable}-{hashlib.sha256(target_name.encode()).hexdigest()[:8]}"


def free_alias(xml: str, target_name: str) -> str | None:
    """`alias_of` the name, or None if something else has it in this XML: libvirt then makes one.

    Raises:
        DomainXmlError, LimitExceeded: As `domain_facts`.
    """
    ours = alias_of(target_name)
    taken = any(alias.get("name") == ours for alias in _parse(xml).iterfind("devices/*/alias"))
    return None if taken else ours


def find_channel_element(xml: str, target_name: str) -> ChannelElement | None:
    """The channel of this name, as it stands in this XML.

    Raises:
        DomainXmlError, LimitExceeded: As `domain_facts`.
    """
    element = _find_element(_parse(xml), target_name)
    if element is None:
        return None
    alias = element.find("alias")
    text = ElementTree.tostring(element, encoding="unicode").strip()
    return ChannelElement(alias.get("name") if alias is not None else None, text)


def channel_xml(
    target_name: str = TARGET_NAME, *, alias: str | None = "", path: str | None = None
) -> str:
    """The <channel> to attach. Leave `path` out: libvirt then owns it, and SELinux, AppArmor and
    migration work.

    Args:
        alias: "": `alias_of` the name. None: libvirt makes one.
    """
    alias = alias_of(target_name) if alias == "" else alias
    source = f" path={saxutils.quoteattr(path)}" if path is not None else ""
    named = f"<alias name={saxutils.quoteattr(alias)}/>" if alias is not None else ""
    return (
        f"<channel type='unix'><source mode='bind'{source}/>"
        f"<target type='virtio' name={saxutils.quoteattr(target_name)}/>{named}</channel>"
    )


def _parse(xml: str) -> ElementTree.Element:
    if len(xml) > XML_CHARS_MAX:
        raise LimitExceeded("domain XML", len(xml), XML_CHARS_MAX, "XML_CHARS_MAX")
    try:
        _refuse_document_type(xml)
        root = ElementTree.fromstring(xml)
    except (expat.ExpatError, ElementTree.ParseError, ValueError) as error:
        raise DomainXmlError(f"domain XML cannot be parsed: {error}") from error
    if root.tag != "domain":
        raise DomainXmlError(f"domain XML has the root <{root.tag}>, expected <domain>")
    return root


def _refuse_document_type(xml: str) -> None:
    """libvirt writes none, and only a document type can make a parser grow or fetch things."""
    prolog = expat.ParserCreate()

    def refuse(*_: object) -> NoReturn:
        raise DomainXmlError("domain XML has a document type; libvirt never writes one")

    prolog.StartDoctypeDeclHandler = refuse
    prolog.Parse(xml, True)


def _required_text(root: ElementTree.Element, tag: str) -> str:
    text = root.findtext(tag, "").strip()
    if not text:
        raise DomainXmlError(f"domain XML has no <{tag}>")
    return text


def _uuid(root: ElementTree.Element) -> str:
    text = _required_text(root, "uuid")
    try:
        return str(uuids.UUID(text))
    except ValueError as error:
        raise DomainXmlError(f"domain XML has the uuid {text!r}: {error}") from error


def _channel_path(root: ElementTree.Element, target_name: str) -> str | None:
    """The channel's socket. One that is not a listening unix socket has none we could use."""
    channel = _find_element(root, target_name)
    if channel is None or channel.get("type") != "unix":
        return None
    source = channel.find("source")
    return source.get("path") if source is not None and source.get("mode") == "bind" else None


def _find_element(root: ElementTree.Element, target_name: str) -> ElementTree.Element | None:
    for channel in root.iterfind("devices/channel"):
        target = channel.find("target")
        if target is None:
            continue
        if target.get("type") == "virtio" and target.get("name") == target_name:
            return channel
    return None


def _has_controller(root: ElementTree.Element) -> bool:
    return any(
        controller.get("type") == "virtio-serial"
        for controller in root.iterfind("devices/controller")
    )


def _has_own_port(root: ElementTree.Element) -> bool:
    ports = (*root.iterfind("devices/channel"), *root.iterfind("devices/console"))
    return any(_target_type(port) == "virtio" and not _is_attached(port) for port in ports)


def _target_type(device: ElementTree.Element) -> str:
    target = device.find("target")
    return target.get("type", "") if target is not None else ""


def _is_attached(device: ElementTree.Element) -> bool:
    """By somebody who gave it a name, as we do: nova gives none."""
    alias = device.find("alias")
    return alias is not None and alias.get("name", "").startswith("ua-")


def _is_rescued(root: ElementTree.Element) -> bool:
    """Only where the domain is nova's: elsewhere a disk may be called anything."""
    return _nova_instance(root) is not None and any(
        value.endswith(NOVA_RESCUE_DISK)
        for source in root.iterfind("devices/disk/source")
        for value in (source.get(key, "") for key in ("file", "dev", "name"))
    )


def _nova_instance(root: ElementTree.Element) -> tuple[ElementTree.Element, str] | None:
    """What nova wrote of the server, and how its tags begin."""
    for namespace in NOVA_NAMESPACES:
        instance = root.find(f"metadata/{{{namespace}}}instance")
        if instance is not None:
            return instance, f"{{{namespace}}}"
    return None


def _nova_metadata(root: ElementTree.Element) -> Mapping[str, str]:
    values = dict.fromkeys(METADATA_KEYS, "")
    found = _nova_instance(root)
    if found is not None:
        instance, tag = found
        values["name"] = instance.findtext(f"{tag}name", "")
        values["flavor"] = _attribute(instance, f"{tag}flavor", "name")
        values["project"] = _attribute(instance, f"{tag}owner/{tag}project", "uuid")
        values["project_name"] = instance.findtext(f"{tag}owner/{tag}project", "")
        values["user"] = _attribute(instance, f"{tag}owner/{tag}user", "uuid")
        values["user_name"] = instance.findtext(f"{tag}owner/{tag}user", "")
        values["image"] = _image(instance.find(f"{tag}root"))
    cut = {key: value[:METADATA_CHARS_MAX] for key, value in values.items()}
    return types.MappingProxyType(cut)


def _nova_labels(root: ElementTree.Element) -> Mapping[str, str] | None:
    found = _nova_instance(root)
    if found is None:
        return None
    instance, tag = found
    specs = instance.find(f"{tag}flavor/{tag}extraSpecs")
    properties = instance.find(f"{tag}image/{tag}properties")
    if specs is None and properties is None:
        return None
    labels: dict[str, str] = {}
    for kind, parent in ((EXTRA_SPEC, specs), (PROPERTY, properties)):
        for element in parent if parent is not None else ():
            name, value = element.get("name", ""), element.text or ""
            bytes_max = max(len(name.encode()), len(value.encode()))
            if name and bytes_max <= LABEL_BYTES_MAX and len(labels) < LABELS_MAX:
                labels[f"{kind}:{name}"] = value
    return types.MappingProxyType(labels)


def _nova_addresses(root: ElementTree.Element) -> tuple[str, ...]:
    found = _nova_instance(root)
    if found is None:
        return ()
    instance, tag = found
    addresses: dict[str, None] = {}
    for element in instance.iterfind(f"{tag}ports/{tag}port/{tag}ip"):
        try:
            address = ipaddress.ip_address(element.get("address", ""))
        except ValueError:
            continue
        if len(addresses) < ADDRESSES_MAX:
            addresses[address.compressed] = None
    return tuple(addresses)


def _attribute(parent: ElementTree.Element, path: str, name: str) -> str:
    element = parent.find(path)
    return element.get(name, "") if element is not None else ""


def _image(root_disk: ElementTree.Element | None) -> str:
    """A VM booted from a volume has a root of another type, and no image."""
    if root_disk is None or root_disk.get("type") != "image":
        return ""
    return root_disk.get("uuid", "")


# --- which domains get a channel ------------------------------------------------------------

SELECTION_RULES_MAX = 1000
"""Rules of `select`: each is tried for each domain."""

# Which rules match as globs; the rest are UUIDs, compared as such.
_GLOB_KEYS = frozenset({"name", "project", "user", "flavor", "image"})


@dataclass(frozen=True, slots=True)
class Selection:
    """The domains that get a channel attached: those that match any of the rules.

    A domain whose XML has the channel already is served whether it is selected or not; what its
    guest may do there is the policy's business.

    Rules: `*`, `name:GLOB` (libvirt's name), `uuid:UUID`, `project:GLOB`, `user:GLOB`,
    `flavor:GLOB`, `image:GLOB`, `extra-spec:NAME=GLOB`, `property:NAME=GLOB` (these six from nova's
    metadata; without it they never match).
    """

    rules: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, rules: Iterable[str], *, where: str = "select") -> Selection:
        """Read rules, as they stand in the configuration.

        Args:
            where: The option's name, for messages.

        Raises:
            ConfigError: A rule is none of the above, or there are over SELECTION_RULES_MAX.
        """
        parsed = tuple(_parse_rule(rule.strip(), where) for rule in rules)
        if len(parsed) > SELECTION_RULES_MAX:
            raise ConfigError(where, f"{len(parsed)} rules; at most {SELECTION_RULES_MAX}")
        return cls(parsed)

    @property
    def asks_labels(self) -> bool:
        """Whether a rule goes by what older releases of nova do not write."""
        return any(":" in key for key, _ in self.rules)

    def matches(self, facts: DomainFacts) -> bool:
        return any(_rule_matches(key, pattern, facts) for key, pattern in self.rules)


def _parse_rule(rule: str, where: str) -> tuple[str, str]:
    if rule == "*":
        return "name", "*"
    key, colon, pattern = rule.partition(":")
    if key in LABEL_KINDS:
        name, _, pattern = pattern.partition("=")
        if name and pattern:
            return f"{key}:{name}", pattern
    if not colon or not pattern or (key not in _GLOB_KEYS and key != "uuid"):
        globs = [f"{key}:GLOB" for key in sorted(_GLOB_KEYS)]
        labels = [f"{kind}:NAME=GLOB" for kind in LABEL_KINDS]
        expected = ", ".join(["*", "uuid:UUID", *globs, *labels])
        raise ConfigError(where, f"{rule!r} is not a rule; expected one of {expected}")
    if key == "uuid":
        try:
            return key, str(uuids.UUID(pattern))
        except ValueError:
            raise ConfigError(where, f"{pattern!r} in {rule!r} is not a UUID") from None
    return key, pattern


def _rule_matches(key: str, pattern: str, facts: DomainFacts) -> bool:
    if key == "uuid":
        return facts.uuid == pattern
    if ":" in key:
        value = (facts.labels or {}).get(key, "")
    else:
        value = facts.name if key == "name" else facts.metadata.get(key, "")
    # A missing value must not match `project:*`: that means "any project", not "none".
    return bool(value) and fnmatch.fnmatchcase(value, pattern)
