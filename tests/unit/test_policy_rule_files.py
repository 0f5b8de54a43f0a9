"""Policy files on disk: real files, with real modes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vchan.errors import ConfigError
from vchan.host.policy import rule_files
from vchan.host.policy.rule_files import load, read, topic_rules
from vchan.host.policy.rule_parser import FILE_CHARS_MAX, PolicyError, parse
from vchan.host.policy.rules import KINDS, Ask, Effect, Facts, Kind, Verdict

VM = Facts("11111111-2222-3333-4444-555555555555")
LISTEN = Ask(Kind.LISTEN, "openstack", "agent")
REPLY = Ask(Kind.REPLY, "openstack", "agent")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "policy.d"
    path.mkdir(mode=0o755)
    return path


def write(directory: Path, name: str, text: str, mode: int = 0o644) -> Path:
    path = directory / name
    path.write_text(text)
    path.chmod(mode)
    return path


def test_files_are_read_by_name_and_others_are_not(directory: Path) -> None:
    write(directory, "90-b.policy", "listen any any deny")
    write(directory, "10-a.policy", "listen any agent allow")
    for name in ("README", "10-a.policy.rpmsave", "10-a.policy~", ".10-a.policy.swp", "11-x.bak"):
        write(directory, name, "nonsense")
    policy = load(str(directory))
    assert policy.decide(VM, LISTEN) == Verdict(Effect.ALLOW, f"{directory}/10-a.policy:1")
    assert len(policy.rules) == 2


def test_many_files_are_read_in_the_order_of_their_names(directory: Path) -> None:
    names = [f"{(number * 37) % 100:02}-{number}.policy" for number in range(100)]
    for name in names:
        write(directory, name, "")
    assert [Path(path).name for path, _ in read(str(directory))] == sorted(names)


def test_no_directory_and_an_empty_one_allow_nothing(directory: Path) -> None:
    assert read(str(directory)) == read(str(directory / "none")) == []
    assert load(str(directory)).decide(VM, LISTEN).effect is Effect.DENY


@pytest.mark.parametrize(
    "name", ["a.policy", "1-a.policy", "500-a.policy", "50_a.policy", "50-.policy"]
)
def test_a_name_without_a_place_in_the_order_is_refused(directory: Path, name: str) -> None:
    write(directory, name, "call any any allow")
    with pytest.raises(ConfigError, match=r"expected a name like 50-name\.policy"):
        load(str(directory))


def test_an_error_in_one_file_is_an_error_of_the_whole(directory: Path) -> None:
    write(directory, "10-a.policy", "listen any any allow")
    path = write(directory, "50-b.policy", "\nlisten any any allwo\n")
    with pytest.raises(PolicyError) as caught:
        load(str(directory))
    assert str(caught.value).startswith(f"{path}:2: 'allwo'; expected allow")


def test_what_anybody_may_write_is_no_policy(directory: Path) -> None:
    path = write(directory, "50-a.policy", "listen any any allow", mode=0o646)
    with pytest.raises(ConfigError, match=f"{path}: anybody may write"):
        load(str(directory))
    path.chmod(0o644)
    directory.chmod(0o1777)
    with pytest.raises(ConfigError, match=f"{directory}: anybody may write"):
        load(str(directory))


def test_what_belongs_to_another_user_is_no_policy(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(directory, "50-a.policy", "listen any any allow")
    owner = directory.stat().st_uid
    monkeypatch.setattr("os.geteuid", lambda: owner + 1)
    if owner == 0:
        os.chown(directory, 12345, -1)
    with pytest.raises(ConfigError, match="belongs to user"):
        load(str(directory))


def test_what_is_no_regular_file(directory: Path) -> None:
    os.mkfifo(directory / "50-a.policy", 0o644)
    with pytest.raises(ConfigError, match="no regular file"):
        load(str(directory))


def test_what_cannot_be_read(directory: Path) -> None:
    (directory / "50-a.policy").symlink_to(directory / "nowhere")
    with pytest.raises(ConfigError, match=r"50-a.policy: cannot be read: No such file"):
        load(str(directory))
    file = write(directory, "60-file", "")
    with pytest.raises(ConfigError, match="cannot be read: Not a directory"):
        load(str(file))


def test_what_is_too_much(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(directory, "50-a.policy", "#" * (FILE_CHARS_MAX + 1))
    with pytest.raises(PolicyError, match="FILE_CHARS_MAX"):
        load(str(directory))
    path.write_text("#")
    monkeypatch.setattr(rule_files, "_ENTRIES_MAX", 0)
    with pytest.raises(ConfigError, match="1 entries; expected at most 0"):
        load(str(directory))


def test_what_is_no_text(directory: Path) -> None:
    (directory / "50-a.policy").write_bytes(b"# fine\nlisten any \xff allow\n")
    with pytest.raises(PolicyError, match=r"50-a.policy:2: byte 0xff; expected UTF-8"):
        load(str(directory))


# --- listen_topics


def test_listen_topics_are_rules_after_the_files(directory: Path) -> None:
    policy = load(str(directory), ["other", "openstack/ag*"])
    assert policy.decide(VM, LISTEN) == Verdict(Effect.ALLOW, "[vchan] listen_topics:2")
    assert policy.decide(VM, REPLY).effect is Effect.ALLOW
    assert policy.decide(VM, REPLY._replace(topic="x")).effect is Effect.DENY
    write(directory, "50-a.policy", "any any */agent deny")
    verdict = load(str(directory), ["*"]).decide(VM, LISTEN)
    assert verdict == Verdict(Effect.DENY, f"{directory}/50-a.policy:1")


@pytest.mark.parametrize(
    ("topic", "text"),
    [
        ("a/b/c", "'a/b/c'"),
        ("agent # mine", "a comment needs a line of its own"),
        ("agent server:x", "expected a pattern of TOPIC"),
        ("name:x", "expected a pattern of TOPIC"),
        ("", "expected a pattern of TOPIC"),
        ("[a", "expected a ] to each ["),
    ],
)
def test_a_topic_that_is_none(topic: str, text: str) -> None:
    with pytest.raises(PolicyError) as caught:
        topic_rules(["fine", topic])
    assert str(caught.value).startswith("[vchan] listen_topics:2: ")
    assert text in str(caught.value)


# --- what is written about it


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("file", ["docs/policy.md", "etc/policy.d/90-default.policy"])
def test_the_examples_are_rules(file: str) -> None:
    """Indented lines that begin with a word of the language and end with one."""
    first = (*KINDS, "cast,notify", "mode", "limit")
    examples = []
    for line in (ROOT / file).read_text().splitlines():
        words = line.removeprefix("#").split()
        is_code = line.startswith(("    ", "#     "))
        if is_code and words and words[0] in first and "WHO..." not in words:
            examples.append(" ".join(words))
    assert len(examples) >= 4
    assert len(parse([(file, "\n".join(examples))]).rules) >= 3
