"""What can be set is in the documents, the manual and the samples: none is forgotten."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("oslo_config", reason='oslo.config is not installed: pip install "vchan[host]"')
pytest.importorskip("oslo_messaging", reason="oslo.messaging is not installed")

from oslo_config import cfg

from tests import docs
from vchan.gateways import http, zeromq
from vchan.guest import daemon
from vchan.guest.port import KINDS
from vchan.host import config
from vchan.host.broker import config as broker_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def build() -> Any:
    """What makes the packages' files."""
    spec = importlib.util.spec_from_file_location("vchan_build", ROOT / "packaging" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def names(options: list[Any]) -> set[str]:
    return {option.name for option in options}


def in_code(text: str) -> set[str]:
    """Every word that stands as code in a document."""
    return set(re.findall(r"[\w.-]+", " ".join(re.findall(r"`([^`]+)`", text))))


def test_the_documents_have_every_option_of_the_brokers() -> None:
    broker = in_code((ROOT / "docs" / "broker.md").read_text())
    assert set(broker_config.HONOURED) - broker == set()


def test_the_documents_have_every_option_of_a_guests_programs() -> None:
    guest, shapes = ((ROOT / "docs" / name).read_text() for name in ("guest.md", "shapes.md"))
    for program, text in ((daemon, guest), (http, shapes), (zeromq, shapes)):
        options = set(re.findall(r"--[a-z-]+", program.USAGE)) - {"--version", "--help"}
        assert {option for option in options if option not in text} == set()


def test_the_documents_have_every_kind_of_port() -> None:
    guest = (ROOT / "docs" / "guest.md").read_text()
    kinds = re.findall(r"(\w+):", KINDS)
    assert len(kinds) >= 7
    assert [kind for kind in kinds if f"`{kind}:" not in guest] == []


def test_the_sample_has_every_option_and_changes_none(build: Any, tmp_path: Path) -> None:
    sample = build.host_configuration()
    set_there = re.findall(r"(?m)^#(\w+) = ?(.*)$", sample)
    given = {name for name, _ in set_there}
    assert given == names(config.OPTIONS) | {"transport_url"}
    for name in broker_config.HONOURED:
        assert re.search(rf"\b{name}\b", sample.partition("[oslo_messaging_rabbit]")[2])
    assert all(len(line) <= 100 for line in sample.splitlines())

    plain = tmp_path / "plain.conf"
    plain.write_text(sample)
    as_is = config.load(["--config-file", str(plain)])
    all_set = re.sub(r"(?m)^#(?!transport_url|host )(\w+ = ?.*)$", r"\1", sample)
    plain.write_text(all_set)
    loaded = config.load(["--config-file", str(plain)])
    for option in config.OPTIONS:
        assert loaded.vchan[option.name] == as_is.vchan[option.name], option.name
    assert config.unknown_options(loaded) == []


def test_the_manual_has_every_option(build: Any) -> None:
    page = build.host_options()
    assert set(re.findall(r"(?m)^\.It Ic (\w+)$", page)) >= names(config.OPTIONS)
    assert set(re.findall(r"(?m)^\.Ic (\w+) [,.]$", build.host_honoured())) == set(
        broker_config.HONOURED
    )
    used = set(re.findall(r"@([A-Z]+)@", (ROOT / "packaging/man/vchan.conf.5").read_text()))
    assert used == {"DATE", "OPTIONS", "HONOURED"}


def test_the_brokers_options_are_those_that_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read: set[str] = set()
    get = broker_config._OsloOptions.get

    def noting(self: Any, name: str, default: Any) -> Any:
        read.add(name)
        return True if name == "ssl" else get(self, name, default)

    monkeypatch.setattr(broker_config._OsloOptions, "get", noting)
    conf = cfg.ConfigOpts()
    conf([], default_config_files=[], default_config_dirs=[])
    broker_config.BrokerConfig.from_oslo(conf)
    assert read == set(broker_config.HONOURED)


def test_the_manual_has_every_exit_status() -> None:
    page = (ROOT / "packaging" / "man" / "vchan-host.8").read_text()
    section = page.partition(".Sh EXIT STATUS\n")[2].partition(".Sh ")[0]
    said = [int(number) for number in re.findall(r"(?m)^\.It (\d+)$", section)]
    assert said == [status.number for status in docs.exit_statuses("vchan.host.daemon")]


PUT_TOGETHER = {"refused by the host", "vchan-host ends"}
"""Parts of a log's lines that the code makes of two."""


def test_each_line_of_a_log_that_the_documents_explain_is_one_that_a_daemon_writes() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    rows = re.findall(r"(?m)^\| (`.*?) \|", page.partition("## By line of the host's log")[2])
    assert len(rows) >= 20
    code = "".join(file.read_text() for file in sorted((ROOT / "vchan").rglob("*.py")))
    code = re.sub(r'"\n\s*f?"', "", code)
    for line in (line for row in rows for line in re.findall(r"`([^`]+)`", row)):
        fixed = [part.strip(" :;()") for part in re.split(r"\b[A-Z_]{2,}\b", line)]
        missing = [part for part in fixed if len(part) > 2 and part not in code]
        assert set(missing) <= PUT_TOGETHER, line


def test_the_table_of_what_was_run_in_debian_13_has_every_real_test_once() -> None:
    page = (ROOT / "docs" / "compatibility.md").read_text()
    table = page.partition("| of tests/real, in Debian 13 |")[2].partition("\n\n")[0]
    cells = re.findall(r"(?m)^\| .* \| (.*) \|$", table)
    named = [name for cell in cells for name in cell.split(", ")]
    files = [path.stem.removeprefix("test_") for path in (ROOT / "tests/real").glob("test_*.py")]
    assert sorted(named) == sorted(files)


@pytest.mark.parametrize(
    ("page", "link", "packaged"),
    [
        ("docs/faq.md", "[b](b.md#c)", "[b](b.md#c)"),
        ("docs/faq.md", "[c](#c)", "[c](#c)"),
        ("docs/faq.md", "[site](https://example.org/b.md)", "[site](https://example.org/b.md)"),
        ("docs/faq.md", "![p](pictures/p.svg)", "![p](pictures/p.svg)"),
        ("docs/decisions/index.md", "[a](../faq.md)", "[a](../faq.md)"),
        ("docs/faq.md", "[e](../examples/e.py)", "[e](../../vchan-guest/examples/e.py)"),
        ("docs/faq.md", "[l](../libvirt/README.md#n)", "[l](../examples/libvirt/README.md#n)"),
        ("docs/faq.md", "[me](../README.md)", "[me](../README.md)"),
        ("README.md", "[a](docs/faq.md)", "[a](docs/faq.md)"),
        ("libvirt/README.md", "[a](../docs/faq.md)", "[a](../../docs/faq.md)"),
        ("docs/faq.md", "the [plugin](../devstack/settings), too", "the plugin, too"),
    ],
)
def test_a_link_of_a_packaged_page(page: str, link: str, packaged: str, build: Any) -> None:
    assert build.with_links_of_packages(page, link) == packaged
