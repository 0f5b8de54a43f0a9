"""Where the broker is: oslo.messaging's options, as a file and a URL say them."""

from __future__ import annotations

import ssl
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from oslo_config import cfg

from tests.rig.certificates import Authority
from vchan.errors import ConfigError
from vchan.host.broker.amqp import explain
from vchan.host.broker.config import BrokerConfig, BrokerHost, BrokerTls, messaging_options


def from_oslo(directory: Path, text: str) -> BrokerConfig:
    path = directory / "vchan.conf"
    path.write_text(text)
    conf = cfg.ConfigOpts()
    conf(["--config-file", str(path)], project="vchan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return BrokerConfig.from_oslo(conf)


@pytest.fixture(scope="module")
def default_of() -> dict[str, Any]:
    """The options of this release of oslo.messaging's, with their defaults."""
    found = dict(messaging_options())["oslo_messaging_rabbit"]
    return {option.name.replace("-", "_"): option.default for option in found}


def test_defaults(tmp_path: Path, default_of: dict[str, Any]) -> None:
    config = from_oslo(tmp_path, "[DEFAULT]\ntransport_url = rabbit://\n")
    assert config == BrokerConfig(
        hosts=(BrokerHost("localhost", 5672, "guest", "guest"),),
        heartbeat_rate=default_of["heartbeat_rate"],
    )


def test_options(tmp_path: Path, default_of: dict[str, Any]) -> None:
    made = Authority(tmp_path).issue("host")
    for name, file in (("ca", made.ca), ("cert", made.certificate), ("key", made.key)):
        file.rename(tmp_path / name)
    config = from_oslo(
        tmp_path,
        f"""
        [DEFAULT]
        transport_url = rabbit://u:p%40%2F@h1:5673,v:q@[::1]/vh?heartbeat_timeout_threshold=7
        [oslo_messaging_rabbit]
        heartbeat_timeout_threshold = 9
        heartbeat_rate = 2
        ssl = true
        ssl_ca_file = {tmp_path}/ca
        ssl_cert_file = {tmp_path}/cert
        ssl_key_file = {tmp_path}/key
        rabbit_login_method = PLAIN
        amqp_auto_delete = true
        rabbit_quorum_queue = true
        rabbit_transient_quorum_queue = true
        rabbit_quorum_delivery_limit = 5
        rabbit_quorum_max_memory_length = 6
        rabbit_quorum_max_memory_bytes = 7
        rabbit_transient_queues_ttl = 60
        rabbit_qos_prefetch_count = 10
        rabbit_retry_interval = 3
        rabbit_interval_max = 40
        """.replace("        ", ""),
    )
    assert config == BrokerConfig(
        hosts=(BrokerHost("h1", 5673, "u", "p@/"), BrokerHost("::1", 5672, "v", "q")),
        virtual_host="vh",
        tls=BrokerTls(f"{tmp_path}/ca", f"{tmp_path}/cert", f"{tmp_path}/key"),
        login_method="PLAIN",
        heartbeat_s=7,
        heartbeat_rate=2,
        durable=True,
        auto_delete=True,
        quorum=True,
        fanout_quorum="rabbit_transient_quorum_queue" in default_of,
        quorum_arguments={
            argument: value
            for name, argument, value in (
                ("rabbit_quorum_max_memory_length", "x-max-in-memory-length", 6),
                ("rabbit_quorum_max_memory_bytes", "x-max-in-memory-bytes", 7),
            )
            if name in default_of
        },
        fanout_expires_s=60,
        retry_min_s=3,
        retry_max_s=40,
        shuffle=True,
        prefetch=10,
    )
    assert [host.address for host in config.hosts] == ["h1:5673", "[::1]:5672"]
    assert "p@" not in repr(config)


def test_durable_without_quorum_queues(tmp_path: Path, default_of: dict[str, Any]) -> None:
    text = "[DEFAULT]\ntransport_url = rabbit://h/?amqp_durable_queues=true\n"
    assert from_oslo(tmp_path, text) == replace(
        BrokerConfig(hosts=(BrokerHost("h"),)),
        durable=True,
        heartbeat_rate=default_of["heartbeat_rate"],
    )


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("transport_url = kafka://", "transport_url"),
        ("transport_url = nonsense", "transport_url"),
        ("transport_url = rabbit://h/?heartbeat_timeout_threshold=x", "transport_url's heartbeat"),
        ("transport_url = rabbit://h/?rabbit_login_method=RABBIT-CR-DEMO", "rabbit_login_method"),
        (
            "transport_url = rabbit://\n[oslo_messaging_rabbit]\nssl = true\nssl_ca_file = /no/ca",
            r"\[oslo_messaging_rabbit\] ssl_ca_file: /no/ca: No such file",
        ),
    ],
)
def test_mistakes(tmp_path: Path, text: str, where: str) -> None:
    with pytest.raises(ConfigError, match=where):
        from_oslo(tmp_path, f"[DEFAULT]\n{text}\n")


@pytest.mark.parametrize("reason", ["TLSV13_ALERT_CERTIFICATE_REQUIRED", "TLSV1_ALERT_UNKNOWN_CA"])
def test_an_alert_of_the_broker_names_the_options_to_look_at(reason: str) -> None:
    """It may come in place of a closed connection, as the kernel will have it."""
    error = ssl.SSLError(1, f"[SSL: {reason}] {reason.lower()}")
    error.reason = reason
    config = BrokerConfig(hosts=(BrokerHost("h", 5671),), tls=BrokerTls())
    assert "ssl_cert_file" in explain(error, config)


@pytest.mark.parametrize(
    "error",
    [ConnectionResetError(104, "reset"), OSError("Server unexpectedly closed connection")],
)
def test_a_broker_that_hangs_up_may_speak_tls(error: OSError) -> None:
    assert "ssl is off" in explain(error, BrokerConfig(hosts=(BrokerHost("one", 5671),)))
    assert "ssl is off" not in explain(ConnectionRefusedError(), BrokerConfig(hosts=()))
