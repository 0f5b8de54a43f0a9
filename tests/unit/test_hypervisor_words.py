"""What libvirt says in bytes that are no text."""

from __future__ import annotations

import pytest

libvirt = pytest.importorskip("libvirt", reason="libvirt-python is not installed")
if not hasattr(libvirt, "open"):  # our own folder of XML
    pytest.skip("libvirt-python is not installed", allow_module_level=True)

from vchan.host.hypervisor.libvirt_client import REFUSAL_CHARS_MAX, _decoded, _undecodable_refusal  # noqa: E402


def refuse(said: bytes) -> None:
    """As libvirt-python does: its C code fails in the middle of failing."""
    try:
        said.decode()
    except UnicodeDecodeError as error:
        raise SystemError("returned a result with an exception set") from error


def test_a_refusal_that_is_no_utf8_is_told_and_no_fault_of_ours() -> None:
    with pytest.raises(SystemError) as caught:
        refuse(b"(domain_definition): caf\xe9" + b"x" * 10_000 + b"\nmore")
    said = _undecodable_refusal(caught.value)
    assert said.startswith("libvirt refuses it ((domain_definition): caf\N{REPLACEMENT CHARACTER}x")
    assert "virsh desc" in said
    assert len(said) < REFUSAL_CHARS_MAX + 250 and "\n" not in said
    assert _undecodable_refusal(KeyError("x")) == ""


def test_text_that_is_no_utf8_is_read_all_the_same() -> None:
    assert _decoded(lambda: "caf\xe9") == ("caf\xe9", True)
    text, is_utf8 = _decoded(b"<a>caf\xe9</a>".decode)
    assert (text, is_utf8) == ("<a>caf\N{REPLACEMENT CHARACTER}</a>", False)
