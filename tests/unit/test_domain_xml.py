"""domain_xml: facts from libvirt's XML, the XML that attaches a channel, the selection."""

import re
from pathlib import Path
from xml.etree import ElementTree
from xml.sax import saxutils

import pytest

from vchan.errors import ConfigError, LimitExceeded
from vchan.host.hypervisor import domain_xml
from vchan.host.hypervisor.domain_xml import (
    ADDRESSES_MAX,
    ALIAS,
    LABEL_BYTES_MAX,
    LABELS_MAX,
    METADATA_CHARS_MAX,
    METADATA_KEYS,
    TARGET_NAME,
    XML_CHARS_MAX,
    DomainFacts,
    DomainState,
    DomainXmlError,
    Selection,
    alias_of,
    channel_xml,
    domain_facts,
    find_channel_element,
    free_alias,
)

SNIPPETS = Path(__file__).parents[2] / "libvirt"
UUID = "8b6a6b6e-0f0c-4d2b-9a53-3f7e1f6f5f10"
PATH = "/var/lib/libvirt/qemu/channel/target/domain-3-vm1/org.openstack.vchan.0"
NO_METADATA = dict.fromkeys(METADATA_KEYS, "")

CONTROLLER = "<controller type='virtio-serial' index='0'/>"
LIVE_CHANNEL = f"""
<channel type='unix'>
  <source mode='bind' path='{PATH}'/>
  <target type='virtio' name='{TARGET_NAME}' state='connected'/>
  <alias name='ua-vchan0'/>
  <address type='virtio-serial' controller='0' bus='0' port='1'/>
</channel>"""
AGENT_CHANNEL = """
<channel type='unix'>
  <source mode='bind' path='/var/lib/libvirt/qemu/org.qemu.guest_agent.0.vm1.sock'/>
  <target type='virtio' name='org.qemu.guest_agent.0'/>
</channel>"""


def domain(devices: str = "", *, live: bool = True, metadata: str = "") -> str:
    number = " id='3'" if live else ""
    return (
        f"<domain type='qemu'{number}><name>vm1</name><uuid>{UUID}</uuid>"
        f"<metadata>{metadata}</metadata><devices>{devices}</devices></domain>"
    )


def nova(version: str, root: str = "<nova:root type='image' uuid='image-1'/>") -> str:
    return f"""
<nova:instance xmlns:nova="http://openstack.org/xmlns/libvirt/nova/{version}">
  <nova:package version="27.0.0"/>
  <nova:name>web</nova:name>
  <nova:flavor name="m1.small"><nova:memory>2048</nova:memory></nova:flavor>
  <nova:owner>
    <nova:user uuid="user-1">alice</nova:user>
    <nova:project uuid="project-1">shop</nova:project>
  </nova:owner>
  {root}
</nova:instance>"""


def facts_of(xml: str, next_boot: str | None = None) -> DomainFacts:
    return domain_facts(xml, next_boot, state=DomainState.RUNNING)


# --- facts ------------------------------------------------------------------------------------


def test_a_running_domain_with_its_channel() -> None:
    live = domain(CONTROLLER + AGENT_CHANNEL + LIVE_CHANNEL)
    next_boot = domain(CONTROLLER + channel_xml(), live=False)
    assert facts_of(live, next_boot) == DomainFacts(
        uuid=UUID,
        name="vm1",
        state=DomainState.RUNNING,
        channel_path=PATH,
        has_controller=True,
        configured=True,
        persistent=True,
        has_own_port=True,
        metadata=NO_METADATA,
    )


def test_a_transient_domain_without_anything() -> None:
    facts = facts_of(domain())
    assert facts == DomainFacts(uuid=UUID, name="vm1", state=DomainState.RUNNING)
    assert facts.active


def test_a_domain_that_is_off_has_no_live_channel() -> None:
    xml = domain(CONTROLLER + channel_xml(path="/run/fixed.sock"), live=False)
    facts = domain_facts(xml, xml, state=DomainState.SHUTOFF)
    assert (facts.active, facts.configured, facts.persistent) == (False, True, True)
    assert (facts.channel_path, facts.has_controller) == (None, False)


@pytest.mark.parametrize(
    ("live", "state"),
    [(False, DomainState.RUNNING), (True, DomainState.SHUTOFF)],
    ids=["it started meanwhile", "it stopped meanwhile"],
)
def test_active_is_what_both_xml_and_state_say(live: bool, state: DomainState) -> None:
    xml = domain(CONTROLLER + LIVE_CHANNEL, live=live)
    facts = domain_facts(xml, None, state=state, incoming=True, outgoing=True)
    assert facts.state is DomainState.SHUTOFF
    assert (facts.incoming, facts.outgoing, facts.channel_path) == (False, False, None)


def test_a_migrating_domain() -> None:
    xml = domain(LIVE_CHANNEL)
    assert domain_facts(xml, None, state=DomainState.PAUSED, incoming=True).incoming
    assert domain_facts(xml, None, state=DomainState.PAUSED, outgoing=True).outgoing


@pytest.mark.parametrize(
    "channel",
    [
        f"<channel type='pty'><source path='/dev/pts/1'/>"
        f"<target type='virtio' name='{TARGET_NAME}'/></channel>",
        f"<channel type='unix'><source mode='connect' path='/x'/>"
        f"<target type='virtio' name='{TARGET_NAME}'/></channel>",
        f"<channel type='unix'><target type='virtio' name='{TARGET_NAME}'/></channel>",
    ],
    ids=["pty", "connect", "no source"],
)
def test_a_channel_of_another_kind_has_no_path(channel: str) -> None:
    facts = facts_of(domain(channel), domain(channel, live=False))
    assert (facts.channel_path, facts.configured) == (None, True)


def test_channels_that_are_not_ours_are_passed_over() -> None:
    guestfwd = f"<channel type='unix'><target type='guestfwd' name='{TARGET_NAME}'/></channel>"
    assert (
        facts_of(domain(guestfwd + "<channel type='unix'/>" + AGENT_CHANNEL)).channel_path is None
    )


def test_another_target_name() -> None:
    xml = domain(AGENT_CHANNEL)
    facts = domain_facts(xml, None, state=DomainState.RUNNING, target_name="org.qemu.guest_agent.0")
    assert facts.channel_path == "/var/lib/libvirt/qemu/org.qemu.guest_agent.0.vm1.sock"


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_nova_metadata(version: str) -> None:
    assert facts_of(domain(metadata=nova(version))).metadata == {
        "project": "project-1",
        "user": "user-1",
        "flavor": "m1.small",
        "image": "image-1",
        "name": "web",
        "project_name": "shop",
        "user_name": "alice",
    }


def test_labels_are_extra_specs_and_properties_or_nobodys_word() -> None:
    """The XML is what nova's own test of its release 34 expects it to write."""
    newer = (SNIPPETS / "nova-metadata-example.xml").read_text()
    facts = facts_of(domain(metadata=newer))
    assert facts.labels == {
        "extra-spec:vchan:enabled": "true",
        "extra-spec:hw_rng:allowed": "true",
        "property:hw_qemu_guest_agent": "True",
        "property:os_distro": "debian",
    }
    assert facts_of(domain(metadata=nova("1.1"))).labels is None
    assert facts_of(domain()).labels is None
    empty = nova("1.1").replace("</nova:flavor>", "<nova:extraSpecs/></nova:flavor>")
    assert facts_of(domain(metadata=empty)).labels == {}


def test_labels_are_bounded_and_never_cut() -> None:
    spec = "<nova:extraSpec name='{}'>{}</nova:extraSpec>"
    good = "".join(spec.format(f"n{number}", "v") for number in range(LABELS_MAX))
    odd = spec.format("long", "v" * (LABEL_BYTES_MAX + 1)) + spec.format("", "v") + "<nova:x/>"
    odd += spec.format("wide", "\xe9" * LABEL_BYTES_MAX) + spec.format("k" * 256, "v")
    specs = f"<nova:extraSpecs>{odd}{good}{spec.format('late', 'v')}</nova:extraSpecs>"
    written = nova("1.1").replace("</nova:flavor>", f"{specs}</nova:flavor>")
    labels = facts_of(domain(metadata=written)).labels
    assert labels == {f"extra-spec:n{number}": "v" for number in range(LABELS_MAX)}


def addressed(*ips: str) -> str:
    ports = "".join(f"<nova:port uuid='p'>{ip}</nova:port>" for ip in ips)
    return nova("1.1").replace(
        "</nova:instance>", f"<nova:ports>{ports}</nova:ports></nova:instance>"
    )


def test_addresses_are_those_that_nova_has_given() -> None:
    """In their shortest form, and each once."""
    ip = "<nova:ip type='{}' address='{}' ipVersion='4'/>".format
    two = ip("fixed", "192.0.2.7") + ip("floating", "198.51.100.1")
    more = ip("fixed", "2001:DB8:0:0::7") + ip("fixed", "192.0.2.7") + ip("fixed", "nonsense")
    facts = facts_of(domain(metadata=addressed(two, more + "<nova:ip type='fixed'/>")))
    assert facts.addresses == ("192.0.2.7", "198.51.100.1", "2001:db8::7")
    assert facts_of(domain(metadata=nova("1.1"))).addresses == ()
    assert facts_of(domain()).addresses == ()
    many = "".join(ip("fixed", f"192.0.2.{number}") for number in range(ADDRESSES_MAX + 5))
    assert len(facts_of(domain(metadata=addressed(many))).addresses) == ADDRESSES_MAX


def test_what_nova_wrote_is_cut() -> None:
    written = nova("1.1").replace("web", "w" * 10_000)
    assert facts_of(domain(metadata=written)).metadata["name"] == "w" * METADATA_CHARS_MAX


SPICE = "<channel type='spicevmc'><target type='virtio' name='com.redhat.spice.0'/></channel>"
CONSOLE = "<console type='pty'><target type='virtio' port='1'/></console>"
SERIAL = "<console type='pty'><target type='serial' port='0'/></console>"
OTHERS = "<channel type='unix'><target type='virtio' name='x'/><alias name='ua-x'/></channel>"


@pytest.mark.parametrize(
    ("devices", "loses"),
    [
        (LIVE_CHANNEL, True),
        (LIVE_CHANNEL + SERIAL + OTHERS + "<channel type='unix'/>", True),
        (LIVE_CHANNEL + AGENT_CHANNEL, False),
        (
            LIVE_CHANNEL
            + AGENT_CHANNEL.replace("</channel>", "<alias name='channel0'/></channel>"),
            False,
        ),
        (LIVE_CHANNEL + SPICE, False),
        (LIVE_CHANNEL + CONSOLE, False),
        (LIVE_CHANNEL.replace("ua-vchan0", "channel0"), False),  # a nova that writes it
        (AGENT_CHANNEL.replace("</channel>", "<alias name='ua-a'/></channel>"), False),  # none yet
    ],
)
def test_a_server_loses_its_channel_if_nova_gives_it_no_controller(
    devices: str, loses: bool
) -> None:
    xml = domain(CONTROLLER + devices, metadata=nova("1.1"))
    assert facts_of(xml).will_lose_channel is loses
    assert not facts_of(domain(CONTROLLER + devices)).will_lose_channel  # it is not nova's
    off = domain_facts(xml.replace(" id='3'", ""), None, state=DomainState.SHUTOFF)
    assert not off.will_lose_channel


@pytest.mark.parametrize(
    "root", ["", "<nova:root type='volume' uuid='volume-1'/>", "<nova:root type='image'/>"]
)
def test_nova_metadata_of_a_vm_without_an_image(root: str) -> None:
    assert facts_of(domain(metadata=nova("1.1", root))).metadata["image"] == ""


def test_nova_metadata_that_is_empty_or_of_an_unknown_version() -> None:
    empty = "<nova:instance xmlns:nova='http://openstack.org/xmlns/libvirt/nova/1.1'/>"
    assert facts_of(domain(metadata=empty)).metadata == NO_METADATA
    assert facts_of(domain(metadata=nova("9.9"))).metadata == NO_METADATA


RESCUE_DISKS = {
    "file": "<source file='/var/lib/nova/instances/8b6a/disk.rescue'/>",
    "lvm": "<source dev='/dev/vg/8b6a_disk.rescue'/>",
    "ceph": "<source protocol='rbd' name='vms/8b6a_disk.rescue'><host name='m'/></source>",
}


@pytest.mark.parametrize("source", RESCUE_DISKS.values(), ids=RESCUE_DISKS)
@pytest.mark.parametrize("stable", [False, True])
def test_a_server_in_rescue_is_known_by_its_disk(source: str, stable: bool) -> None:
    """nova puts it first; or last, where the image asks for a device of its own."""
    own = "<disk type='file'><source file='/var/lib/nova/instances/8b6a/disk'/></disk>"
    rescue = f"<disk type='block'>{source}</disk>"
    disks = own + rescue if stable else rescue + own
    facts = facts_of(domain(CONTROLLER + LIVE_CHANNEL + disks, metadata=nova("1.1")))
    assert facts.rescued
    assert (facts.channel_path, facts.served_path) == (PATH, None)
    assert not facts_of(domain(disks)).rescued  # it is not nova's
    assert not facts_of(domain(own, metadata=nova("1.1"))).rescued
    of_a_chain = f"<disk><source file='/x/disk'/><backingStore>{source}</backingStore></disk>"
    assert not facts_of(domain(of_a_chain, metadata=nova("1.1"))).rescued


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        ("<domain>", "cannot be parsed"),
        ("<domainsnapshot/>", "root <domainsnapshot>"),
        ("<domain><uuid>x</uuid><name>vm</name></domain>", "the uuid 'x'"),
        ("<domain><name>vm</name></domain>", "no <uuid>"),
        (f"<domain><uuid>{UUID}</uuid><name> </name></domain>", "no <name>"),
        ("<!DOCTYPE domain [<!ENTITY a 'aaaa'>]><domain>&a;</domain>", "document type"),
    ],
)
def test_what_is_not_a_domain_is_refused(xml: str, message: str) -> None:
    with pytest.raises(DomainXmlError, match=message):
        facts_of(xml)


def test_xml_over_the_limit_is_refused() -> None:
    with pytest.raises(LimitExceeded, match="XML_CHARS_MAX"):
        facts_of(" " * (XML_CHARS_MAX + 1))


NOTES = [
    "<!DOCTYPE html><p>a note</p>",
    "<!DOCTYPE x [<!ENTITY a 'b'>]>",
    "<devices><channel type='unix'><source mode='bind' path='/forged'/>"
    f"<target type='virtio' name='{TARGET_NAME}'/></channel></devices>",
    "</domain>",
    "<?xml version='1.0'?><!ENTITY x SYSTEM 'file:///etc/passwd'>",
]


@pytest.mark.parametrize("note", NOTES)
@pytest.mark.parametrize(
    "form",
    [
        "<a:n xmlns:a='urn:x'><![CDATA[{}]]></a:n>",
        "<a:n xmlns:a='urn:x'><!-- {} --></a:n>",
        "<a:n xmlns:a='urn:x'><?note {} ?></a:n>",
        "<a:n xmlns:a='urn:x' said=\"{escaped}\">{escaped}</a:n>",
    ],
    ids=["cdata", "comment", "instruction", "text"],
)
def test_what_stands_in_texts_is_text(note: str, form: str) -> None:
    if "instruction" in form or "?note" in form:
        note = note.replace("?>", "")
    text = form.format(note, escaped=saxutils.escape(note, {'"': "&quot;"}))
    plain = domain(CONTROLLER + LIVE_CHANNEL)
    noted = domain(CONTROLLER + LIVE_CHANNEL, metadata=text)
    assert facts_of(noted, noted) == facts_of(plain, plain)


@pytest.mark.parametrize(
    "prolog",
    [
        "<!DOCTYPE domain>",
        "<!DOCTYPE domain [<!ENTITY a 'aaaa'><!ENTITY b '&a;&a;'>]>",
        "<!DOCTYPE domain SYSTEM 'http://example.invalid/x.dtd'>",
        "<?xml version='1.0'?> <!-- c --> <!DOCTYPE\ndomain>",
    ],
)
def test_a_document_type_is_refused(prolog: str) -> None:
    with pytest.raises(DomainXmlError, match="has a document type"):
        facts_of(prolog + domain(LIVE_CHANNEL))


@pytest.mark.parametrize("xml", ["", "<domain>", "<domain>\x00</domain>", "<domain>&x;</domain>"])
def test_what_cannot_be_parsed_is_an_error_of_its_own(xml: str) -> None:
    with pytest.raises(DomainXmlError, match="cannot be parsed"):
        facts_of(xml)


# --- the channel's XML ------------------------------------------------------------------------


def test_channel_xml() -> None:
    channel = ElementTree.fromstring(channel_xml())
    assert channel.get("type") == "unix"
    assert [(child.tag, child.attrib) for child in channel] == [
        ("source", {"mode": "bind"}),
        ("target", {"type": "virtio", "name": TARGET_NAME}),
        ("alias", {"name": ALIAS}),
    ]


def test_channel_xml_quotes_what_it_is_given() -> None:
    channel = ElementTree.fromstring(channel_xml("a'b\"<&", alias=None, path="/x'<>"))
    assert channel.find("alias") is None
    assert [child.attrib for child in channel] == [
        {"mode": "bind", "path": "/x'<>"},
        {"type": "virtio", "name": "a'b\"<&"},
    ]


NAMES = ["com.example.vchan.0", "com.example-vchan.0", "com example vchan 0", "x" * 64, "\xe9"]


def test_aliases_are_such_that_libvirt_keeps_and_one_each() -> None:
    assert alias_of(TARGET_NAME) == ALIAS
    aliases = [alias_of(name) for name in (TARGET_NAME, *NAMES)]
    assert len(set(aliases)) == len(aliases)
    assert all(re.fullmatch(r"ua-[A-Za-z0-9_-]{1,60}", alias) for alias in aliases)
    assert f"'{alias_of(NAMES[0])}'" in channel_xml(NAMES[0]).replace('"', "'")


def test_an_alias_that_something_else_has_is_not_given_again() -> None:
    """An older vchan gave every channel this one, whatever its name."""
    other = channel_xml("com.example.vchan.0", alias=ALIAS)
    assert free_alias(domain(other), TARGET_NAME) is None
    assert free_alias(domain(other), "com.example.vchan.0") == alias_of("com.example.vchan.0")
    disk = f"<disk type='file'><alias name='{ALIAS}'/></disk>"
    assert free_alias(domain(disk), TARGET_NAME) is None
    assert free_alias(domain(AGENT_CHANNEL), TARGET_NAME) == ALIAS


def test_a_channel_is_found_in_each_definition_as_it_stands_there() -> None:
    live = find_channel_element(domain(AGENT_CHANNEL + LIVE_CHANNEL), TARGET_NAME)
    assert live is not None
    assert live.alias == "ua-vchan0" and live.has_own_alias
    assert PATH in live.xml and live.xml.startswith("<channel") and live.xml.endswith("</channel>")
    bare = channel_xml(alias=None, path="/fixed").replace("/>", ">", 0)
    next_boot = find_channel_element(domain(AGENT_CHANNEL + bare, live=False), TARGET_NAME)
    assert next_boot is not None
    assert next_boot.alias is None and not next_boot.has_own_alias
    assert "/fixed" in next_boot.xml
    assert find_channel_element(domain(AGENT_CHANNEL), TARGET_NAME) is None


# --- the snippets in libvirt/ -----------------------------------------------------------------


def test_snippet_is_what_we_attach() -> None:
    def shape(text: str) -> list[tuple[str, dict[str, str]]]:
        return [(element.tag, element.attrib) for element in ElementTree.fromstring(text).iter()]

    assert shape((SNIPPETS / "channel.xml").read_text()) == shape(channel_xml())


def test_snippets_with_path_and_controller() -> None:
    path = SNIPPETS / "channel-with-path.xml"
    facts = facts_of(domain((SNIPPETS / "controller.xml").read_text() + path.read_text()))
    assert facts.has_controller
    assert (facts.channel_path or "").startswith("/")


def test_example_domain() -> None:
    xml = (SNIPPETS / "domain-example.xml").read_text()
    facts = domain_facts(xml, xml, state=DomainState.SHUTOFF)
    assert facts.configured


def test_nova_example() -> None:
    facts = facts_of(domain(metadata=(SNIPPETS / "nova-metadata-example.xml").read_text()))
    assert all(facts.metadata[key] for key in METADATA_KEYS)


# --- the selection ----------------------------------------------------------------------------

NOVA_VM = facts_of(domain(metadata=nova("1.1")))
PLAIN_VM = facts_of(domain())


@pytest.mark.parametrize(
    ("rule", "nova_vm", "plain_vm"),
    [
        ("*", True, True),
        ("name:vm*", True, True),
        ("name:VM*", False, False),
        (f"uuid:{UUID.upper()}", True, True),
        ("uuid:00000000-0000-0000-0000-000000000000", False, False),
        ("project:project-?", True, False),
        ("project:*", True, False),
        ("user:user-1", True, False),
        ("flavor:m1.*", True, False),
        ("image:image-[12]", True, False),
        ("image:other", False, False),
    ],
)
def test_rules(rule: str, nova_vm: bool, plain_vm: bool) -> None:
    selection = Selection.parse([f"  {rule} "])
    assert selection.matches(NOVA_VM) is nova_vm
    assert selection.matches(PLAIN_VM) is plain_vm


@pytest.mark.parametrize(
    ("rule", "labelled_vm"),
    [
        ("extra-spec:vchan:enabled=true", True),
        ("extra-spec:vchan:enabled=t*", True),
        ("extra-spec:vchan:enabled=*", True),
        ("extra-spec:vchan:enabled=True", False),
        ("extra-spec:vchan:*=true", False),
        ("extra-spec:vchan=true", False),
        ("extra-spec:hw_qemu_guest_agent=True", False),
        ("property:hw_qemu_guest_agent=True", True),
        ("property:os_distro=[du]*", True),
        ("property:vchan:enabled=true", False),
    ],
)
def test_rules_by_what_newer_novas_write(rule: str, labelled_vm: bool) -> None:
    selection = Selection.parse([rule])
    assert selection.asks_labels and not Selection.parse(["flavor:x", "*"]).asks_labels
    newer = (SNIPPETS / "nova-metadata-example.xml").read_text()
    assert selection.matches(facts_of(domain(metadata=newer))) is labelled_vm
    assert not selection.matches(NOVA_VM) and not selection.matches(PLAIN_VM)


def test_any_rule_is_enough_and_none_selects_nothing() -> None:
    assert Selection.parse(["name:nobody", "flavor:m1.small"]).matches(NOVA_VM)
    assert not Selection.parse([]).matches(NOVA_VM)


@pytest.mark.parametrize(
    "rule",
    [
        *("", "all", "vm1", "name:", ":x", "colour:red", "**"),
        *("extra-spec:", "extra-spec:a", "extra-spec:=b", "extra-spec:a=", "property"),
        "extra-spec=a",
    ],
)
def test_what_is_not_a_rule_is_refused(rule: str) -> None:
    with pytest.raises(ConfigError, match=r"host\.select: .* is not a rule; expected one of \*"):
        Selection.parse(["*", rule], where="host.select")


def test_bad_uuid_is_refused() -> None:
    with pytest.raises(ConfigError, match="'1234' in 'uuid:1234' is not a UUID"):
        Selection.parse(["uuid:1234"])


def test_too_many_rules_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(domain_xml, "SELECTION_RULES_MAX", 2)
    Selection.parse(["*"] * 2)
    with pytest.raises(ConfigError, match="3 rules; at most 2"):
        Selection.parse(["*"] * 3)
