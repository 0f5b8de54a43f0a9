"""The standard agent's files as bytes, and a caller that falls back to base64."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.unit.oslo_site import VM, Site, made_site
from vchan.agents.standard.files import CHUNK_BYTES_MAX, RAW_PART
from vchan.client import Client
from vchan.errors import Rejected, RemoteError

ROOT = Path(__file__).parents[2]
TOPIC = "vchan.standard"
SIZE = 2 * CHUNK_BYTES_MAX + 12_345


@contextmanager
def standard(site: Site, older: bool = False) -> Iterator[Path]:
    """A guest with a standard agent that may read and write in the directory that this gives."""
    site.guest_module = "tests.rig.older" if older else site.guest_module
    site.start_guest()
    inside = site.directory.resolve() / "in"
    inside.mkdir(mode=0o755)
    config = site.directory / "standard.toml"
    config.write_text(f'[read]\nallow = ["{inside}/*"]\n[write]\nallow = ["{inside}/*"]\n')
    config.chmod(0o644)
    command = [sys.executable, "-m", "vchan.guest.daemon", "standard-agent"]
    with (site.directory / "agent.log").open("wb") as log:
        agent = subprocess.Popen(
            [*command, "--config", str(config), "--socket", f"{site.directory}/agent.sock"],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        site.wait_served(TOPIC)
        yield inside
    finally:
        agent.terminate()
        agent.wait()


@pytest.fixture
def site() -> Iterator[Site]:
    with made_site() as site:
        yield site


def example() -> Any:
    """The caller that users copy."""
    spec = importlib.util.spec_from_file_location("copy", ROOT / "examples" / "copy_with_guest.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("older", [False, True], ids=["raw", "an older guest"])
def test_a_file_is_copied_both_ways(site: Site, older: bool) -> None:
    content = os.urandom(SIZE)
    with standard(site, older) as inside, Client(site.host.path) as client:
        guest = example().Guest(client, VM)
        guest.write(f"{inside}/file", content)
        same = (inside / "file").read_bytes() == content
        assert same, "altered on its way in"
        same = b"".join(guest.read(f"{inside}/file")) == content
        assert same, "altered on its way out"
        assert guest._is_raw is not older
        guest.write(f"{inside}/empty", b"")
        assert b"".join(guest.read(f"{inside}/empty")) == b""


def test_the_rules_hold_for_bytes_too(site: Site) -> None:
    with standard(site) as inside, Client(site.host.path) as client:

        def ask(method: str, data: bytes = b"", **args: Any) -> bytes:
            return client.call_raw(TOPIC, method, data, args, server=VM)

        path = f"{inside}/file"
        (inside / "file").write_bytes(b"content")
        head = RAW_PART.pack(7, (inside / "file").stat().st_mtime_ns)
        assert ask("file_read_raw", path=path) == head + b"content"
        assert ask("file_read_raw", path=path, offset=3, count=2) == head + b"te"
        assert ask("file_read_raw", path=path, offset=100) == head
        with pytest.raises(RemoteError, match="Rejected: /etc/hostname: is not allowed"):
            ask("file_read_raw", path="/etc/hostname")
        with pytest.raises(RemoteError, match="takes no bytes"):
            ask("file_read_raw", b"x", path=path)
        with pytest.raises(Rejected, match=r"file_read of topic .* takes JSON"):
            ask("file_read", path=path)
        digest = hashlib.sha256(b"other").hexdigest()
        args = {"path": path, "size": 5, "sha256": digest}
        begun = client.call(TOPIC, "file_write_begin", args, server=VM)["id"]
        with pytest.raises(RemoteError, match="is not what its sha256 says"):
            ask("file_write_raw", b"wrong", id=begun, offset=0, sha256=digest)
        with pytest.raises(RemoteError, match="ends after the 5 bytes"):
            ask("file_write_raw", b"others", id=begun, offset=0)
        with pytest.raises(RemoteError, match="no file is being written as 'none'"):
            ask("file_write_raw", b"other", id="none", offset=0)
        with pytest.raises(RemoteError, match="CHUNK_BYTES_MAX"):
            ask("file_write_raw", bytes(CHUNK_BYTES_MAX + 1), id=begun, offset=0)
        assert ask("file_write_raw", b"other", id=begun, offset=0, sha256=digest) == b""
        client.call(TOPIC, "file_write_end", {"id": begun}, server=VM)
        assert (inside / "file").read_bytes() == b"other"


def test_the_caller_says_how_it_is_used() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "copy_with_guest.py"), "a", "b"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr[:6]) == (2, "usage:")
