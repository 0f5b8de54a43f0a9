"""vchan policy: what it prints of a directory of files, without any daemon."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vchan import cli
from vchan.host.policy.rules import KINDS

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "policy.d"
    path.mkdir()
    return path


@pytest.fixture
def run(directory: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """A command; text that stands first becomes the directory's one file."""

    def run(text: str, action: str, *words: str, json: bool = False) -> tuple[int, str, str]:
        (directory / "50-a.policy").write_text(text)
        before = ["--json"] if json else []
        try:
            status = cli.run([*before, "policy", action, "--dir", str(directory), *words])
        except SystemExit as end:  # argparse
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        return status, out.replace(f"{directory}/", ""), err.replace(f"{directory}/", "")

    return run


RULES = """\
call name:web-* any             allow
mode any        one-way-call
call,http any   any             allow
"""


def test_a_policy_without_errors(run: Run) -> None:
    text = (
        RULES + "limit any topics=1\nown any a/b.{uuid}\nown any a/c.{uuid}\ncontext in any a/b k\n"
    )
    said = "no errors; rules: 4; lines of limits: 1, own: 2, context: 1\n"
    assert run(text, "check") == (0, said, "")
    counted = {"rules": 4, "limits": 1, "owns": 2, "contexts": 1}
    assert json.loads(run(text, "check", json=True)[1]) == counted


def test_an_error(run: Run) -> None:
    status, out, err = run("call any\n", "check")
    assert (status, out) == (cli.EXIT_USAGE, "")
    assert err.startswith("vchan: 50-a.policy:1: the line ends; expected a target")
    assert run("call any\n", "lint")[0] == cli.EXIT_USAGE


def test_an_allowed_request_is_explained(run: Run) -> None:
    words = ("--vm", "name=web-1", "call", "nova/conductor", "method=report")
    assert run(RULES, "check", *words) == (
        0,
        "50-a.policy:1: call name:web-* any allow\n    yes\nallow: 50-a.policy:1\n",
        "",
    )


def test_a_denied_request_is_explained(run: Run) -> None:
    words = ("--vm", "name=db", "call", "nova/conductor")
    status, out, _ = run(RULES, "check", *words)
    assert status == cli.EXIT_FAILED
    assert out.splitlines() == [
        "50-a.policy:1: call name:web-* any allow",
        "    no: name 'db' is not 'web-*'",
        "50-a.policy:2: mode any one-way-call",
        "    no: kind 'call' is not 'reply'",
        "50-a.policy:2: mode any one-way-call",
        "    yes",
        "deny: 50-a.policy:2",
    ]
    status, out, _ = run("listen any any allow", "check", "fanout", "a/b", json=True)
    assert status == cli.EXIT_FAILED
    assert json.loads(out) == {
        "effect": "deny",
        "rule": "default",
        "looked_at": [
            {
                "rule": "50-a.policy:1",
                "text": "listen any any allow",
                "mismatch": "kind 'fanout' is not 'listen'",
            }
        ],
        "owner": False,
        "context_keys": {},
    }


def test_all_the_details(run: Run) -> None:
    uuid = "11111111-2222-3333-4444-555555555555"
    vm = f"uuid={uuid.upper()},name=n,project=p,user=u,flavor=f,image=i"
    line = (
        f"call uuid:{uuid} name:n project:p user:u flavor:f image:i "
        "e/t server:s namespace:ns method:m conductor"
    )
    words = ("--vm", vm, "call", "e/t", "server=s", "namespace=ns", "method=m")
    status, out, _ = run(line, "check", *words)
    assert (status, out.splitlines()[-1]) == (0, "conductor: 50-a.policy:1")


def test_a_vms_extra_specs_and_properties(run: Run) -> None:
    line = "call extra-spec:vchan:enabled=true property:os_distro=deb* e/t allow"
    vm = "extra-spec:vchan:enabled=true,property:os_distro=debian"
    assert run(line, "check", "--vm", vm, "call", "e/t")[0] == cli.EXIT_OK
    status, out, _ = run(line, "check", "--vm", "flavor=vchan", "call", "e/t")
    assert status == cli.EXIT_FAILED
    assert "    no: extra-spec:vchan:enabled '' is not 'true'\n" in out


OWNER, OTHER = "11111111-2222-3333-4444-555555555555", "99999999-2222-3333-4444-555555555555"
OWNED = f"""\
listen,reply any trove/*                   allow
own          uuid:{OWNER} trove/guestagent.7
context      in  any      trove/guest*     context
context      in  name:db  */*              other
cast         any trove/conductor           allow
context      out any      trove/conductor  context=16K a-b
context      in  any      trove/conductor  not-this
"""


def test_a_topic_that_belongs_to_a_vm_is_explained(run: Run) -> None:
    """The line decides for its owner and for all others, before any rule."""
    status, out, _ = run(OWNED, "check", "--vm", f"uuid={OWNER}", "listen", "trove/guestagent.7")
    assert (status, out.splitlines()) == (
        0,
        [
            f"50-a.policy:2: own uuid:{OWNER} trove/guestagent.7",
            "    yes: the topic is this VM's alone, also what is sent to it without a server",
            "50-a.policy:3: context in any trove/guest* context",
            "    yes",
            "50-a.policy:4: context in name:db */* other",
            "    no: name '' is not 'db'",
            "50-a.policy:7: context in any trove/conductor not-this",
            "    no: topic 'guestagent.7' is not 'conductor'",
            "passes of its context, besides the options' keys: context",
            "allow: 50-a.policy:2",
        ],
    )
    status, out, _ = run(OWNED, "check", "--vm", f"uuid={OTHER}", "listen", "trove/guestagent.7")
    assert (status, out.splitlines()) == (
        cli.EXIT_FAILED,
        [
            f"50-a.policy:2: own uuid:{OWNER} trove/guestagent.7",
            f"    no: uuid '{OTHER}' is not '{OWNER}'; "
            "so the topic is another's, whatever rules say",
            "deny: 50-a.policy:2",
        ],
    )
    ask = ("listen", "trove/guestagent.7", f"server={OTHER}")
    out = run(OWNED, "check", "--vm", f"uuid={OWNER}", *ask)[1]
    assert f"no: server '{OTHER}' is not '@self'" in out
    ask = ("listen", f"a/t.{OWNER}", f"server={OTHER}")
    out = run("own any a/t.{uuid}", "check", "--vm", f"uuid={OTHER}", *ask)[1]
    assert f"no: uuid '{OTHER}' is not '{OWNER}'" in out
    # An answer goes by rules.
    out = run(OWNED, "check", "--vm", f"uuid={OTHER}", "reply", "trove/guestagent.7")[1]
    assert out.endswith("    yes\nallow: 50-a.policy:1\n")


def test_what_passes_of_a_context_is_explained(run: Run) -> None:
    status, out, _ = run(OWNED, "check", "cast", "trove/conductor", json=True)
    found = json.loads(out)
    assert (status, found["effect"], found["owner"]) == (0, "allow", False)
    assert found["context_keys"] == {"context": 16384, "a-b": 255}
    assert found["looked_at"][-1]["rule"] == "50-a.policy:6"
    assert found["looked_at"][-1]["mismatch"] is None
    found = json.loads(run(OWNED, "check", "call", "trove/conductor", json=True)[1])
    assert (found["effect"], found["context_keys"]) == ("deny", {})
    assert not any(row["text"].startswith("context") for row in found["looked_at"])
    words = ("--vm", f"uuid={OWNER}", "listen", "trove/guestagent.7")
    assert json.loads(run(OWNED, "check", *words, json=True)[1])["owner"] is True


def test_a_topic_alone_is_of_the_default_exchange(run: Run) -> None:
    rules = "listen any openstack/agent allow\nlisten any other/agent deny\n"
    assert run(rules, "check", "listen", "agent")[0] == cli.EXIT_OK
    assert run(rules, "check", "listen", "other/agent")[0] == cli.EXIT_FAILED


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("report any vchan/facts allow", ("report", "facts")),
        ("report any vchan/facts allow", ("report", "vchan/facts")),
        ("http any vchan/metadata allow", ("http", "metadata", "method=GET")),
    ],
)
def test_what_has_an_exchange_of_its_own_is_asked_for_there(
    run: Run, rule: str, words: tuple[str, ...]
) -> None:
    assert run(f"{rule}\n", "check", *words)[0] == cli.EXIT_OK
    assert run(f"{rule.replace('vchan/', 'openstack/')}\n", "check", *words)[0] == cli.EXIT_FAILED


@pytest.mark.parametrize("shape", ["csv", "value", "table"])
def test_the_verdict_is_told_in_every_shape(run: Run, shape: str) -> None:
    for kind, verdict in (("call", "allow"), ("cast", "deny")):
        _, out, _ = run("call any any allow\n", "check", "-f", shape, kind, "a/b")
        assert verdict in out
        shown = run("call any any allow\n", "check", "-f", "value", "-c", "effect", kind, "a/b")
        assert shown[1] == f"{verdict}\n"


def test_the_help_names_every_kind(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.run(["policy", "check", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert {kind for kind in KINDS if str(kind) not in said.partition("KIND ")[2]} == set()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("shout", "a/b"), "'shout': is no kind; expected listen"),
        (("call", "/a"), "'/a': is no target; expected TOPIC or EXCHANGE/TOPIC"),
        (("call", "a/"), "'a/': is no target; expected TOPIC or EXCHANGE/TOPIC"),
        (("call",), "'': is no target; expected TOPIC or EXCHANGE/TOPIC"),
        (("report",), "report '': expected phase, facts, agents, metrics"),
        (("report", "fact"), "report 'fact': expected phase, facts, agents, metrics"),
        (("report", "openstack/facts"), "report 'openstack/facts': expected phase, facts"),
        (("call", "a/b", "color=red"), "color=: expected server, namespace, method"),
        (("call", "a/b", "method"), "expected KEY=VALUE"),
        (("--vm", "color=red", "call", "a/b"), "color=: is no fact; expected uuid"),
        (("--vm", "uuid=x", "call", "a/b"), "uuid=x: is no UUID"),
        (("--vm", "name", "call", "a/b"), "expected KEY=VALUE"),
        (("--vm", "spec:a=b", "call", "a/b"), "spec:a=: is no fact; expected uuid"),
    ],
)
def test_a_question_that_is_none(run: Run, words: tuple[str, ...], text: str) -> None:
    status, out, err = run(RULES, "check", *words)
    assert (status, out) == (cli.EXIT_USAGE, "")
    assert text in err


def test_lint(run: Run) -> None:
    status, out, _ = run(RULES, "lint")
    assert status == cli.EXIT_FAILED
    assert out.splitlines() == [
        "50-a.policy:1: everything: allows call on every topic",
        "50-a.policy:3: shadowed: never decides: 50-a.policy:2 came first for all it matches",
        "50-a.policy:3: everything: allows call, http on every topic for every VM",
        "policy: missing: no rule allows listen: no agent can serve a topic",
    ]
    found = json.loads(run(RULES, "lint", json=True)[1])
    assert found[1]["code"] == "shadowed"
    assert run("listen,reply any agent allow", "lint") == (0, "nothing suspicious\n", "")
    assert json.loads(run("listen,reply any agent allow", "lint", json=True)[1]) == []


def test_no_directory(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["policy", "check", "--dir", str(directory / "none")]) == cli.EXIT_USAGE
    assert "is no directory" in capsys.readouterr().err


def test_the_policy_as_the_configuration_has_it(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("oslo_config", reason="oslo.config is not installed")
    (directory / "50-a.policy").write_text("listen any secret deny\n")
    file = directory / "vchan.conf"
    file.write_text(f"[vchan]\npolicy_dir = {directory}\nlisten_topics = agent\n")
    words = ["policy", "check", "--config-file", str(file), "listen", "openstack/agent"]
    assert cli.run(words) == 0
    assert capsys.readouterr().out.endswith("allow: [vchan] listen_topics:1\n")
