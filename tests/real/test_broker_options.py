"""oslo.messaging's own options at a real RabbitMQ: what they do, and what a mistake looks like."""

from __future__ import annotations

import gc
import json
import re
import shlex
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import amqp
import pytest
from oslo_config import cfg

from tests.rig import rig_directory, wait_until
from tests.rig.broker_peers import TIMEOUT_S, Clients, Host, raw_channel
from tests.rig.certificates import Authority, Certificate
from tests.rig.rabbit import RabbitServer
from tests.rig.requirements import missing_for_rabbit
from vchan.errors import ConfigError
from vchan.host.broker import vm_queues
from vchan.host.broker.broker import Broker
from vchan.host.broker.config import BrokerConfig, BrokerHost
from vchan.host.broker.events import (
    Connected,
    Consuming,
    Delivered,
    Disconnected,
    Released,
    Troubled,
)
from vchan.host.broker.vm_queues import DELIVERY_LIMIT
from vchan.host.oslo_wire.mail import own_queue
from vchan.rpc.messages import Topic

MISSING = missing_for_rabbit()
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(bool(MISSING), reason=str(MISSING)),
    # A stock client leaves its socket to the garbage collector when its connection is lost.
    pytest.mark.filterwarnings(
        "ignore:Exception ignored in. <socket.socket:pytest.PytestUnraisableExceptionWarning"
    ),
]

# Who connects with TLS must show a certificate; its name is a user's, if the client wants that.
CONFIGURATION = """
ssl_options.verify = verify_peer
ssl_options.fail_if_no_peer_cert = true
auth_mechanisms.1 = PLAIN
auth_mechanisms.2 = AMQPLAIN
auth_mechanisms.3 = EXTERNAL
ssl_cert_login_from = common_name
"""


class Pki:
    """The broker's certificate, its user's, and those of an authority that nobody knows."""

    def __init__(self, directory: Path) -> None:
        authority, stranger = Authority(directory), Authority(directory, "stranger")
        self.server = authority.issue("localhost")
        self.user = authority.issue("guest")
        self.stranger = stranger.issue("guest")


@pytest.fixture(scope="module")
def pki() -> Iterator[Pki]:
    with rig_directory() as directory:
        yield Pki(directory)


@pytest.fixture(scope="module")
def rabbit(pki: Pki) -> Iterator[RabbitServer]:
    with (
        rig_directory() as directory,
        RabbitServer(
            directory / "rabbit",
            configuration=CONFIGURATION,
            certificate=pki.server,
            plugins=["rabbitmq_auth_mechanism_ssl"],
        ) as server,
    ):
        yield server


@pytest.fixture
def topic() -> Topic:
    return Topic(f"exchange-{uuid.uuid4().hex[:8]}", f"topic-{uuid.uuid4().hex[:8]}")


@pytest.fixture
def vm() -> str:
    return str(uuid.uuid4())


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm_queues, "RETRY_MIN_S", 0.1)


def from_oslo(url: str, **options: object) -> BrokerConfig:
    """As vchan-host reads it: the URL and [oslo_messaging_rabbit] from a file."""
    lines = [f"{name} = {value}" for name, value in options.items()]
    with rig_directory() as directory:
        path = directory / "vchan.conf"
        head = ["[DEFAULT]", f"transport_url = {url}", "[oslo_messaging_rabbit]"]
        path.write_text("\n".join([*head, *lines]) + "\n")
        conf = cfg.ConfigOpts()
        conf(["--config-file", str(path)], project="vchan")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return BrokerConfig.from_oslo(conf)


def tls_options(own: Certificate | None, ca: Path) -> dict[str, object]:
    options: dict[str, object] = {"ssl": "true", "ssl_ca_file": ca}
    if own is not None:
        options |= {"ssl_cert_file": own.certificate, "ssl_key_file": own.key}
    return options


def tls_url(rabbit: RabbitServer, name: str = "localhost") -> str:
    return f"rabbit://guest:guest@{name}:{rabbit.tls_port}//"


# -------------------------------------------------------------------- TLS


def test_tls(rabbit: RabbitServer, pki: Pki, topic: Topic, vm: str) -> None:
    """Both ends read the same options. Large messages, and many, both ways."""
    options = tls_options(pki.user, pki.server.ca)
    clients = Clients(f"{tls_url(rabbit)}?{urlencode(options)}")
    try:
        with Host(from_oslo(tls_url(rabbit), **options)) as host:
            host.consume(vm, topic)
            for size in (10, 100_000, 2_000_000):
                answer = clients.call(topic, vm, x="x" * size)
                host.answer(host.events.take(Delivered), "y" * size)
                assert answer.result(TIMEOUT_S) == "y" * size
            for x in range(200):
                clients.cast(topic, vm, x=x)
            for x in range(200):
                event = host.events.take(Delivered)
                assert event.request.args["x"] == x
                host.broker.ack(event.token)
    finally:
        clients.close()
        gc.collect()


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("wrong authority", "its certificate is refused"),
        ("wrong name", "not valid for '127.0.0.1'"),
        ("no certificate", "it may want a certificate that it trusts"),
        ("a stranger's certificate", "it may want a certificate that it trusts"),
        ("no TLS there", "it does not speak TLS on this port, and ssl is on"),
        ("no TLS here", "it may speak TLS on this port, and ssl is off"),
    ],
)
def test_tls_that_is_refused(rabbit: RabbitServer, pki: Pki, case: str, words: str) -> None:
    ca, user, stranger = pki.server.ca, pki.user, pki.stranger
    config = {
        "wrong authority": lambda: from_oslo(tls_url(rabbit), **tls_options(user, stranger.ca)),
        "wrong name": lambda: from_oslo(tls_url(rabbit, "127.0.0.1"), **tls_options(user, ca)),
        "no certificate": lambda: from_oslo(tls_url(rabbit), **tls_options(None, ca)),
        "a stranger's certificate": lambda: from_oslo(tls_url(rabbit), **tls_options(stranger, ca)),
        "no TLS there": lambda: from_oslo(rabbit.url, **tls_options(user, ca)),
        "no TLS here": lambda: from_oslo(tls_url(rabbit)),
    }[case]()
    with Host(config) as host:
        assert words in host.events.take(Disconnected).reason
        assert not host.events.has(Connected)


def test_a_key_of_another_certificate_is_refused_at_the_start(
    rabbit: RabbitServer, pki: Pki
) -> None:
    options = tls_options(pki.user, pki.server.ca) | {"ssl_key_file": pki.stranger.key}
    with pytest.raises(ConfigError, match="expected a certificate and its key"):
        from_oslo(tls_url(rabbit), **options)


def test_a_name_that_is_not_checked(rabbit: RabbitServer, pki: Pki) -> None:
    options = tls_options(pki.user, pki.server.ca)
    options["ssl_enforce_hostname_verification"] = "false"
    with Host(from_oslo(tls_url(rabbit, "127.0.0.1"), **options)) as host:
        host.events.take(Connected)


@pytest.mark.parametrize("method", ["AMQPLAIN", "PLAIN", "EXTERNAL"])
def test_login_methods(rabbit: RabbitServer, pki: Pki, method: str) -> None:
    options = tls_options(pki.user, pki.server.ca) | {"rabbit_login_method": method}
    password = "wrong" if method == "EXTERNAL" else "guest"  # it is the certificate that counts
    url = tls_url(rabbit).replace("guest:guest", f"guest:{password}")
    with Host(from_oslo(url, **options)) as host:
        host.events.take(Connected)


# -------------------------------------------------------------------- where it is


def test_a_virtual_host(rabbit: RabbitServer, topic: Topic, vm: str) -> None:
    rabbit.ctl("add_vhost", "tenant/a")
    rabbit.ctl("add_user", "svc", "p@ss:word")
    rabbit.ctl("set_permissions", "-p", "tenant/a", "svc", ".*", ".*", ".*")
    url = f"rabbit://svc:p%40ss%3Aword@127.0.0.1:{rabbit.port}/"
    clients = Clients(f"{url}tenant/a")
    try:
        with Host(from_oslo(f"{url}tenant/a")) as host:
            host.consume(vm, topic)
            clients.cast(topic, vm, x=1)
            assert host.numbers(1) == [1]
        assert not any(vm in name for name in rabbit.queues())
        with Host(from_oslo(f"{url}nowhere")) as host:
            assert "vhost nowhere not found" in host.events.take(Disconnected).reason
    finally:
        clients.close()


def test_permissions_that_lack(rabbit: RabbitServer, topic: Topic, vm: str) -> None:
    """The VM whose queue is forbidden; no other."""
    rabbit.ctl("add_user", "narrow", "narrow")
    rabbit.ctl("set_permissions", "narrow", "^(?!vchan_vm_).*", ".*", ".*")
    other = str(uuid.uuid4())
    url = rabbit.url.replace("guest:guest", "narrow:narrow")
    with Host(from_oslo(url)) as host:
        host.consume(other, topic)
        host.broker.listen_for_answers(vm)
        host.events.assert_quiet(Consuming)
        assert not host.events.has(Released)
        assert not host.events.has(Disconnected)


def test_several_hosts(rabbit: RabbitServer, topic: Topic, vm: str) -> None:
    """The first that answers is taken; another when that is lost."""
    url = rabbit.url.replace("//guest", "//guest:guest@127.0.0.1:1,guest:guest@127.0.0.1:2,guest")
    with Host(from_oslo(url, rabbit_retry_interval=1)) as host:
        host.consume(vm, topic)
        for _ in range(3):
            rabbit.kill_connections()
            host.events.take(Released, vm=vm)
            host.events.take(Consuming, vm=vm)


def test_daemons_spread_over_several_hosts() -> None:
    url = "rabbit://" + ",".join(f"u:p@h{number}:5672" for number in range(4)) + "/"
    config = from_oslo(url)
    first = {Broker(config, lambda _: None)._hosts[0].name for _ in range(100)}
    assert first == {"h0", "h1", "h2", "h3"}
    assert [host.name for host in config.hosts] == ["h0", "h1", "h2", "h3"]


# -------------------------------------------------------------------- queues


@pytest.mark.parametrize("quorum", [False, True])
@pytest.mark.parametrize("transient_quorum", [False, True])
def test_queues_are_declared_as_the_options_say(
    rabbit: RabbitServer, topic: Topic, vm: str, quorum: bool, transient_quorum: bool
) -> None:
    config = from_oslo(
        rabbit.url,
        rabbit_quorum_queue=quorum,
        rabbit_transient_quorum_queue=transient_quorum,
        rabbit_quorum_delivery_limit=50,
        rabbit_transient_queues_ttl=70,
    )
    with Host(replace(config, topic_expires_s=90)) as host:
        host.broker.listen_for_answers(vm)
        host.consume(vm, topic)
    declared = {name: row for name, row in all_queues(rabbit).items() if vm in name}
    expected = {
        f"{topic.name}.{vm}": (quorum, 90),
        f"{topic.name}_fanout_{vm}": (transient_quorum, 70),
        own_queue(vm): (quorum or transient_quorum, 70),
    }
    assert set(declared) == set(expected)
    for name, (is_quorum, expires_s) in expected.items():
        arguments: dict[str, Any] = {
            "x-single-active-consumer": True,
            "x-expires": expires_s * 1000,
        }
        if is_quorum:
            arguments |= {"x-queue-type": "quorum", "x-delivery-limit": DELIVERY_LIMIT}
        assert declared[name] == (True, "quorum" if is_quorum else "classic", arguments)


def all_queues(rabbit: RabbitServer) -> dict[str, tuple[bool, str, dict[str, Any]]]:
    """Durable, type, arguments; by name."""
    columns = ("name", "durable", "type", "arguments")
    rows = json.loads(rabbit.ctl("list_queues", "--formatter", "json", *columns))
    return {
        row["name"]: (
            row["durable"],
            row["type"].removeprefix("rabbit_").removesuffix("_queue"),
            {  # RabbitMQ 4 names the type that is the default, too
                name: value
                for name, _, value in row["arguments"]
                if (name, value) != ("x-queue-type", "classic")
            },
        )
        for row in rows
    }


def test_the_services_delivery_limit_is_not_for_vms_queues(
    rabbit: RabbitServer, topic: Topic, vm: str
) -> None:
    """It counts what consumers reject; here a migration is a return, too."""
    config = from_oslo(rabbit.url, rabbit_quorum_queue=True, rabbit_quorum_delivery_limit=2)
    with Host(config) as host:
        host.consume(vm, topic)
        publish(rabbit, topic, vm)
        for number in range(5):
            assert host.events.take(Delivered).returns == number
            host.broker.release(vm)
            host.events.take(Released, vm=vm)
            host.consume(vm, topic)


def test_an_unused_queue_expires(rabbit: RabbitServer, topic: Topic, vm: str) -> None:
    """Not while somebody consumes."""
    config = replace(from_oslo(rabbit.url, rabbit_transient_queues_ttl=1), topic_expires_s=1)
    with Host(config) as host:
        host.broker.listen_for_answers(vm)
        host.consume(vm, topic)
        publish(rabbit, topic, vm)
        host.events.take(Delivered)
        host.events.assert_quiet(Released, for_s=3.0)
        assert len([name for name in rabbit.queues() if vm in name]) == 3
        host.broker.release(vm)
        host.events.take(Released, vm=vm)
        wait_for_none(rabbit, vm)


def test_a_queue_that_expires_otherwise_is_used_and_said_so(
    rabbit: RabbitServer, topic: Topic, vm: str
) -> None:
    """What waits there for a VM that is away survives a change of the option."""
    config = from_oslo(rabbit.url)
    with Host(replace(config, topic_expires_s=0)) as before:
        before.consume(vm, topic)
    publish(rabbit, topic, vm)
    with Host(replace(config, topic_expires_s=90)) as host:
        host.broker.consume(vm, frozenset({topic}), frozenset())
        (problem,) = host.events.take(Troubled, vm=vm).problems
        assert f"queue {topic.name}.{vm} was declared otherwise" in problem
        assert "x-expires" in problem
        assert host.events.take(Delivered).topic == topic


def test_the_policy_of_the_documents_lets_an_owned_topics_queue_expire(
    rabbit: RabbitServer, topic: Topic, vm: str
) -> None:
    """Not while somebody consumes; and who declares it again, as before, is not refused."""
    document = (Path(__file__).parents[2] / "docs" / "broker.md").read_text()
    found = re.search(r"rabbitmqctl (set_policy vchan-owned .*) --apply-to queues", document)
    assert found is not None
    words = shlex.split(found[1])
    assert re.search(words[2], "guestagent.5e1d0c9a-6f0b-4c9e-9a53-3f7e1f6f5f10")
    assert json.loads(words[3])["expires"] == 7 * 24 * 3600 * 1000
    words[2:] = [f"^{topic.name}$", json.dumps({"expires": 1000})]
    rabbit.ctl(*words, "--apply-to", "queues")
    try:
        with Host(from_oslo(rabbit.url)) as host:
            host.consume(vm, topic, own=True)
            host.events.assert_quiet(Released, for_s=3.0)
            assert topic.name in rabbit.queues()
            host.broker.release(vm)
            host.events.take(Released, vm=vm)
            host.consume(vm, topic, own=True)
            assert not any(event.problems for event in host.events.take_all(Troubled, 1))
        wait_until(
            lambda: topic.name not in rabbit.queues(),
            timeout_s=TIMEOUT_S,
            interval_s=0.1,
            failure=lambda: f"{topic.name} is left: {list(rabbit.queues())}",
        )
    finally:
        rabbit.ctl("clear_policy", words[1])


def publish(rabbit: RabbitServer, topic: Topic, vm: str) -> None:
    body = json.dumps({"method": "note", "args": {}})
    with raw_channel(rabbit) as channel:
        channel.basic_publish(amqp.Message(body), topic.exchange, f"{topic.name}.{vm}")


def wait_for_none(rabbit: RabbitServer, vm: str) -> None:
    wait_until(
        lambda: not any(vm in name for name in rabbit.queues()),
        timeout_s=TIMEOUT_S,
        interval_s=0.1,
        failure=lambda: f"queues are left: {list(rabbit.queues())}",
    )


def test_an_unreachable_broker_is_tried_as_often_as_the_options_say() -> None:
    config = from_oslo(
        "rabbit://guest:guest@127.0.0.1:1//", rabbit_retry_interval=7, rabbit_interval_max=9
    )
    with Host(config) as host:
        host.events.take(Disconnected)
        host.events.assert_quiet(Disconnected)  # the next comes after 3.5 s at the earliest
        assert host.broker.config.hosts == (BrokerHost("127.0.0.1", 1),)
