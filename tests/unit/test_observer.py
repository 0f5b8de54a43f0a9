"""What is so in a guest, as its files and its kernel say."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vchan.agents.standard import facts as facts_module
from vchan.agents.standard import metrics as metrics_module
from vchan.guest import observer
from vchan.guest.observer import (
    ADDRESSES_MAX,
    ATTACHED_MAX,
    ERRORS_MAX,
    FILE_BYTES_MAX,
    TEXT_CHARS_MAX,
    Observer,
    told_agents,
    told_facts,
    told_phase,
)
from vchan.host.vm.reports import Reports
from vchan.io.loop import Loop
from vchan.rpc.bodies import decode_invocation, encode_invocation
from vchan.rpc.in_flight import Send
from vchan.rpc.messages import Receipt, Request, Settled, encode
from vchan.rpc.reports import (
    AGENTS,
    BOOTING,
    FACTS,
    METRICS,
    PHASE,
    PRODUCT_CHARS_MAX,
    READY,
    REPORT_BYTES_MAX,
    TOPIC,
    is_product,
)


def keeps(what: str, report: dict[str, Any]) -> None:
    """A host keeps it, and its envelope is no larger than may be."""
    body = encode_invocation(what, {"report": report, "known": False})
    assert len(body) <= REPORT_BYTES_MAX
    Reports().note(what, {"report": json.loads(json.dumps(report))}, 0.0)


# --- the phase


def phase(directory: Path) -> dict[str, Any]:
    told = told_phase(str(directory / "cloud-init"), str(directory / "nologin"))
    keeps(PHASE, told)
    return told


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def test_a_guest_without_cloud_init_and_systemd_is_ready(tmp_path: Path) -> None:
    assert phase(tmp_path)["phase"] == READY
    assert "cloud_init" not in phase(tmp_path)


def test_systemd_keeps_users_out_until_the_boot_has_finished(tmp_path: Path) -> None:
    write(tmp_path / "nologin", "booting")
    assert phase(tmp_path)["phase"] == BOOTING


def test_cloud_init_has_not_finished(tmp_path: Path) -> None:
    write(tmp_path / "cloud-init" / "status.json", {"v1": {"stage": "modules-config"}})
    assert phase(tmp_path)["phase"] == BOOTING


def test_cloud_init_is_switched_off(tmp_path: Path) -> None:
    write(tmp_path / "cloud-init" / "disabled", "")
    assert phase(tmp_path)["phase"] == READY


def test_cloud_inits_result(tmp_path: Path) -> None:
    errors = ["('scripts_user', RuntimeError('x'))"]
    result = {"v1": {"datasource": "DataSourceConfigDrive [net,ver=2]", "errors": errors}}
    write(tmp_path / "cloud-init" / "result.json", result)
    recoverable = {"init": {"recoverable_errors": {"WARNING": ["a", "b"]}}, "stage": None}
    write(tmp_path / "cloud-init" / "status.json", {"v1": recoverable})
    told = phase(tmp_path)
    assert told["phase"] == READY
    assert told["cloud_init"] == {
        "datasource": "DataSourceConfigDrive [net,ver=2]",
        "errors": errors,
        "recoverable_errors": 2,
    }


@pytest.mark.parametrize(
    "result",
    [
        *("", "{", "[]", '{"v1": 3}', "9" * 5000, "[" * 100_000, "x" * (FILE_BYTES_MAX + 1)),
        {"v1": {"errors": "none", "datasource": None}},
        {"v1": {"errors": ["e" * 1000] * 100, "datasource": "d" * 1000}},
    ],
)
def test_a_result_of_any_kind_is_told_bounded(tmp_path: Path, result: Any) -> None:
    write(tmp_path / "cloud-init" / "result.json", result)
    told = phase(tmp_path)
    assert told["phase"] == READY
    assert len(told["cloud_init"].get("errors", [])) <= ERRORS_MAX


# --- facts, units, metrics


def test_facts_are_the_same_as_long_as_nothing_changes() -> None:
    first = told_facts()
    assert first == told_facts()
    assert "lo" not in [row["interface"] for row in first["addresses"]]
    keeps(FACTS, first)


def test_what_agents_say_that_they_are_is_among_the_facts() -> None:
    assert "attached" not in told_facts()
    assert told_facts(["web/2", "backup/1.9", "web/2"])["attached"] == ["backup/1.9", "web/2"]


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("backup/2.1", True),
        ("a/b/c", True),
        ("agent", False),
        ("/2", False),
        ("backup/", False),
        ("my backup/2", False),
        ("a/\x1b[2J", False),
        ("x" * (PRODUCT_CHARS_MAX - 1) + "/", False),
        ("x" * (PRODUCT_CHARS_MAX - 2) + "/1", True),
        ("x" * (PRODUCT_CHARS_MAX - 1) + "/1", False),
    ],
)
def test_what_is_a_product(text: str, is_one: bool) -> None:
    assert is_product(text) is is_one


def test_a_guest_of_many_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    address = {
        "interface": "eth0123456789abc",
        "mac": "00:11:22:33:44:55",
        "family": "ipv6",
        "address": "2001:0db8:1111:2222:3333:4444:5555:6666",
        "prefix": 128,
    }
    system = {"id": "x" * 999, "version_id": "y" * 999, "pretty_name": "z" * 999}
    made = {
        **facts_module.facts(),
        "addresses": [address] * 500,
        "os": system,
        "machine_id": "m" * 4096,
    }
    monkeypatch.setattr(observer, "facts", lambda: dict(made))
    products = [f"{number:02d}{'é' * (PRODUCT_CHARS_MAX - 5)}/{number:02d}" for number in range(40)]
    told = told_facts(products)
    assert (told["attached"], told["attached_left_out"]) == (products[:ATTACHED_MAX], 24)
    assert len(told["addresses"]) == ADDRESSES_MAX
    assert told["addresses_left_out"] == 500 - ADDRESSES_MAX
    assert all(len(text) <= TEXT_CHARS_MAX for text in told["os"].values())
    keeps(FACTS, told)


def test_a_kernel_that_may_not_be_asked_has_no_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "not permitted")

    monkeypatch.setattr("socket.socket", refuse)
    assert told_facts()["addresses"] == []


def test_a_guest_of_many_units() -> None:
    unit = {"state": "waiting", "starts": 9, "last_exit": "status 1", "problem": "p" * 1000}
    units = {f"unit-{number}": unit for number in range(100)}
    told = told_agents(units)
    assert 0 < len(told["units"]) < 100
    assert told["units_left_out"] == 100 - len(told["units"])
    keeps(AGENTS, told)
    few = told_agents({"a": {"state": "running", "starts": 1, "last_exit": None, "problem": ""}})
    assert "units_left_out" not in few
    keeps(AGENTS, few)


def test_metrics() -> None:
    told = metrics_module.metrics()
    assert told["memory"]["total_bytes"] >= told["memory"]["available_bytes"] > 0
    assert told["file_systems"][0]["path"] == "/"
    keeps(METRICS, told)


MOUNTS = """\
rootfs / rootfs rw 0 0
/dev/sda1 / ext4 rw 0 0
/dev/sda2 /a\\040b ext4 rw 0 0
/dev/sda2 /again ext4 rw 0 0
server:/x /nfs nfs4 rw 0 0
/dev/fuse /fuse fuse rw 0 0
/dev/sdb1 /ntfs fuseblk rw 0 0
tmpfs /tmp tmpfs rw 0 0
short
"""


def test_file_systems_that_keep_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def statvfs(path: str) -> os.statvfs_result:
        asked.append(path)
        return os.statvfs_result((4096, 4096, 10, 5, 4, 100, 50, 50, 0, 255))

    many = "".join(f"/dev/vd{n} /m{n} xfs rw 0 0\n" for n in range(40))
    monkeypatch.setattr(metrics_module, "_lines", lambda _: (MOUNTS + many).splitlines())
    monkeypatch.setattr("os.statvfs", statvfs)
    found, left_out = metrics_module.file_systems()
    assert asked[:3] == ["/", "/a b", "/m0"]
    assert len(found) == metrics_module.FILE_SYSTEMS_MAX
    assert left_out == 42 - len(found)
    assert found[1] == {
        "path": "/a b",
        "type": "ext4",
        "bytes": 40960,
        "available_bytes": 16384,
        "files": 100,
        "free_files": 50,
    }


# --- the observer


class Host:
    """Takes every report at once, if it is there."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []
        self.send: Send = lambda _, __: None

    def attach(self, send: Send) -> Callable[[Request | Settled, float], None]:
        self.send = send
        return self.take

    def take(self, message: Request | Settled, now_s: float) -> None:
        if isinstance(message, Request):
            asked = decode_invocation(message.body)
            self.told.append((asked.method, asked.args["report"]))
            self.send(encode(Receipt(message.id)), 0)


def watching(loop: Loop, host: Host, wanted: dict[str, int], directory: Path) -> Observer:
    made = Observer(
        loop,
        host.attach,
        wanted,
        dict,
        tuple,
        lambda _: None,
        cloud_init=str(directory / "cloud-init"),
        no_login=str(directory / "nologin"),
    )
    made.host_serves((TOPIC,))
    return made


def run_until(loop: Loop, reached: Callable[[], bool]) -> None:
    until_s = loop.time() + 20.0
    while not reached():
        assert loop.time() < until_s
        loop.run_once(0.1)


def test_the_boot_is_watched_until_it_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observer, "BOOT_LOOK_S", 0.01)
    write(tmp_path / "nologin", "booting")
    with Loop() as loop:
        host = Host()
        watch = watching(loop, host, {PHASE: 0}, tmp_path)
        assert [report["phase"] for _, report in host.told] == [BOOTING]
        (tmp_path / "nologin").unlink()
        run_until(loop, lambda: len(host.told) > 1)
        write(tmp_path / "nologin", "going down")  # no second boot
        for _ in range(3):
            loop.run_once(0.02)
        assert [report["phase"] for _, report in host.told] == [BOOTING, READY]
        watch.close()


def test_metrics_at_an_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Loop() as loop:
        host = Host()
        watch = watching(loop, host, {METRICS: 10}, tmp_path)
        monkeypatch.setattr(watch, "_wanted", {METRICS: 0.01})
        watch._measure()
        run_until(loop, lambda: len(host.told) > 3)
        assert {what for what, _ in host.told} == {METRICS}
        watch.close()


def test_nobody_looks_while_no_host_takes_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    found = facts_module.facts()

    def look() -> dict[str, Any]:
        looked.append("facts")
        return dict(found)

    monkeypatch.setattr(observer, "facts", look)
    monkeypatch.setattr(observer, "LOOK_S", 0.01)
    with Loop() as loop:
        host = Host()
        watch = watching(loop, host, {FACTS: 0}, tmp_path)
        run_until(loop, lambda: len(looked) > 2)
        watch.host_serves(())
        watch._kernel_says()
        watch._look()
        count = len(looked)
        for _ in range(5):
            loop.run_once(0.02)
        assert len(looked) == count
        watch.host_serves((TOPIC,))
        assert len(looked) == count + 1
        watch.close()


def test_the_kernel_tells_of_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observer, "SETTLE_S", 0.01)
    changed = {**facts_module.facts(), "addresses": []}
    with Loop() as loop:
        host = Host()
        watch = watching(loop, host, {FACTS: 0}, tmp_path)
        monkeypatch.setattr(observer, "facts", lambda: dict(changed))
        watch._kernel_says()
        run_until(loop, lambda: len(host.told) > 1)
        assert host.told[1][1]["addresses"] == []
        watch.close()
