"""The status page in a browser: what it makes of others' words, and that it looks as meant."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.rig.ports import claim_ports
from tests.rig.requirements import missing_for_browser
from tests.unit.local_host import LocalHost
from tests.unit.test_page import ELEMENTS, ODD, Read, plain, serving
from tests.unit.watched import UUID, a_channel, daemon, detail, row
from vchan.host.ops import page as served
from vchan.host.ops import status_page
from vchan.host.ops.asking import HostAnswers
from vchan.host.ops.status_page import Look

MISSING = missing_for_browser()
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(MISSING is not None, reason=MISSING or ""),
]

PICTURES = Path(os.environ.get("VCHAN_PICTURES", ""))
"""Where screenshots are kept, to be looked at; nowhere if it is not set."""
BROWSER_S = 60.0
COMPLAINTS = ("violates", "Refused to", "Uncaught", "CONSOLE")
"""What the browser's log has of a page that does what its policy forbids."""


@pytest.fixture
def address(short_directory: Path) -> Iterator[str]:
    """Of a page of two daemons, of which one is not there."""
    (port,) = claim_ports(1)
    host_socket = short_directory / "page-host.sock"
    with a_channel() as channel, LocalHost(host_socket) as host:
        host.status.update(daemon(channel))
        host.status.update(detail(channel))
        with serving(f"127.0.0.1:{port}", host_socket, short_directory / "gone.sock"):
            yield f"http://127.0.0.1:{port}/"


def command(directory: Path, address: str, *options: str) -> list[str]:
    """A browser's command line."""
    return [
        "chromium",
        "--headless",
        "--no-sandbox",  # root has none
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-extensions",
        "--disable-background-networking",
        f"--user-data-dir={directory}/profile",
        "--enable-logging=stderr",
        *options,
        address,
    ]


def browse(directory: Path, address: str, *options: str) -> tuple[str, str]:
    """What a browser has made of the page (its DOM as HTML), and what it logged."""
    done = subprocess.run(
        command(directory, address, *options), capture_output=True, text=True, timeout=BROWSER_S
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def complaints(log: str) -> list[str]:
    return [line for line in log.splitlines() if any(word in line for word in COMPLAINTS)]


def odd_host() -> Look:
    """A daemon with VMs whose every word is one that a browser must not obey."""
    with a_channel() as channel:
        vm = detail(channel)
    rows, vms = [], {}
    for number, word in enumerate(ODD):
        uuid = f"{number}-{word}"
        guest = {"phase": word, "os": word, "addresses": [word]}
        of_guest: dict[str, Any] = {"problem": word, "channel": word, "guest": guest}
        of_guest["topics"] = [word, f"openstack/{word}"]
        rows.append({**row(), **of_guest, "uuid": uuid, "name": word, "domain": word})
        vms[uuid] = {**vm, "broker_problems": [word], "fault": word}
    words = "".join(ODD)
    status = daemon(channel, host=words, libvirt=words, policy_problem=words, version=words)
    return Look(words, 0.0, HostAnswers(status, rows, vms, {}))


def given(monkeypatch: pytest.MonkeyPatch, look: Look) -> None:
    """Have the page show this."""
    monkeypatch.setattr(served, "_look", lambda _: look)


def test_a_browser_finds_words_where_words_are(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given(monkeypatch, odd_host())
    dom, log = browse(tmp_path, address, "--dump-dom")
    said = Read(dom.encode())
    assert set(said.elements) <= ELEMENTS
    assert "<title>vchan</title>" in dom
    for word in ODD:
        # A browser's own text has one kind of line end, and no NUL.
        assert plain(word) in said.texts, word
    assert complaints(log) == []


@pytest.mark.parametrize(
    "injected",
    [
        "<script>document.title='owned'</script>",
        "<img src=x onerror=\"document.title='owned'\">",
        "<style>body{color:red}</style>",
        "<iframe src='data:text/html,x'></iframe>",
    ],
)
def test_what_would_get_in_could_do_nothing(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, injected: str
) -> None:
    """As if a word did become an element: the page's policy is a second wall."""
    really = status_page.page

    def broken(looks: Any) -> bytes:
        return really(looks).replace(b"<body>", b"<body>" + injected.encode())

    monkeypatch.setattr(served, "page", broken)
    dom, log = browse(tmp_path, address, "--dump-dom")
    assert "<title>vchan</title>" in dom
    assert complaints(log), "the browser did not say that it refused anything"


def test_a_browser_asks_again_by_itself(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = threading.Semaphore(0)

    def counting(looks: Any) -> bytes:
        asked.release()
        return status_page.page(looks)

    monkeypatch.setattr(served, "page", counting)
    monkeypatch.setattr(status_page, "REFRESH_S", 1)
    words = command(tmp_path, address, "--remote-debugging-port=0")  # so that it stays
    quiet = subprocess.DEVNULL
    with subprocess.Popen(words, stdin=quiet, stdout=quiet, stderr=quiet) as browser:
        try:
            assert asked.acquire(timeout=BROWSER_S)
            assert asked.acquire(timeout=BROWSER_S)
        finally:
            browser.terminate()


def reported(number: int) -> dict[str, Any]:
    """By a guest."""
    addresses = [f"10.0.{number}.7", *(f"2001:db8:{number}::{n}" for n in range(1, 2 * number + 1))]
    systems = (
        "Debian GNU/Linux 12 (bookworm)",
        "Rocky Linux 9.4 (Blue Onyx)",
        "Alpine Linux v3.20",
    )
    system = systems[number % len(systems)]
    return {"phase": "booting" if number == 1 else "ready", "os": system, "addresses": addresses}


def busy(at_s: float, more: int) -> Look:
    """A host with something to see."""
    with a_channel() as channel:
        vm, totals = detail(channel), channel.totals()
    counted = {
        "requests": 1200 + 400 * more,
        "guest_requests": 90 + 70 * more,
        "frames_sent": 5000 + 900 * more,
        "frames_received": 5100 + 950 * more,
        "losses": 3,
        "frames_lost": 17,
        "frames_resent": 17,
        "resumptions": 4,
    }
    states = ["ready"] * 4 + ["waiting", "quarantined", "arriving", "none"]
    names = ("trove-mysql-0", "trove-mysql-1", "octavia-amphora", "web-0", "web-1", "build-7")
    rows, vms = [], {}
    for number, (name, state) in enumerate(zip((*names, "moving", "router"), states, strict=True)):
        uuid = f"{number:08x}{UUID[8:]}"
        problem = {"quarantined": "in quarantine for 12 s more: 40 sessions in 10 s"}.get(state)
        topics = ["openstack/agent", "openstack/metrics"][: number % 3] if state == "ready" else []
        rows.append(
            {**row(state, problem), "uuid": uuid, "name": name, "topics": topics}
            | ({"guest": reported(number)} if state == "ready" else {})
            | ({"domain": "shutoff"} if state == "none" else {})
        )
        vms[uuid] = (
            {"state": "none"}
            if state == "none"
            else {
                **vm,
                "requests": {**vm["requests"], "requests": (number + 1) * (300 + 100 * more)},
            }
        )
    status = daemon(None, totals={**totals, **counted}, domains=len(rows))
    return Look("/run/vchan/host.sock", at_s, HostAnswers(status, rows, vms, {}))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_looks_as_meant(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    gone = Look("/run/vchan/relay-b.sock", 20.0, None, "nobody listens there")
    looks = [(busy(10.0, 0), busy(20.0, 1)), (None, gone)]
    monkeypatch.setattr(served, "page", lambda _: status_page.page(looks))
    picture = tmp_path / f"page-{scheme}.png"
    dark = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"]
    _, log = browse(
        tmp_path,
        address,
        f"--screenshot={picture}",
        "--window-size=1280,1100",
        "--hide-scrollbars",
        *(dark if scheme == "dark" else []),
    )
    assert complaints(log) == []
    assert picture.stat().st_size > 20_000, "a page without its style is smaller"
    if PICTURES.is_absolute():
        PICTURES.mkdir(parents=True, exist_ok=True)
        (PICTURES / picture.name).write_bytes(picture.read_bytes())
