"""What scripts/package builds: lint, contents, and installing it in a bare Debian."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.rig import debian_image, rig_directory
from tests.rig.booted_tree import BootedTree
from tests.rig.cloud import Cloud
from tests.rig.debian_image import Scripts, chroot_command, copy_of_tree, in_chroot
from tests.rig.hosting import HostEnd
from tests.rig.packages import ROOT, Artefacts, package
from tests.unit.cable import Cable

_MISSING = debian_image.missing_for_debian()
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(_MISSING is not None, reason=str(_MISSING)),
]

EXPOSURE_MAX = {
    "vchan-host.service": 1.5,
    "vchan-relay@.service": 1.5,
    "vchan-conductor.service": 1.3,
    "vchan-masakari.service": 1.5,
    "vchan-page.service": 1.1,
    "vchan-proxy.service": 1.5,
    "vchan-forward@.service": 1.5,
    "vchan-guest.service": 0.5,
    "vchan-http.service": 1.5,
    "vchan-zmq.service": 0.5,
}
"""systemd-analyze security's, of 10; the guest's with the drop-in relay-only.conf."""
HOST_UNITS = (
    "vchan-host.service",
    "vchan-relay@control.service",
    "vchan-conductor.service",
    "vchan-masakari.service",
    "vchan-page.service",
    "vchan-proxy.service",
    "vchan-forward@web.service",
    "vchan-forward@web.socket",
)
GUEST_UNITS = ("vchan-guest.service", "vchan-http.service", "vchan-zmq.service")
CHECK_CONFIGURATION = """
from vchan.guest.daemon import parse_options
assert parse_options(["--config", "/root/guest.conf"]) == parse_options([])
"""
CHECK_UNIT = """
import tomllib
from vchan.agents.units import parse_unit
path = "/usr/share/doc/vchan-guest/examples/agents.d/standard.toml"
unit = parse_unit("standard", path, tomllib.load(open(path, "rb")))
assert unit.command[0] == "/usr/bin/vchan-guest", unit
"""
NO_BROKER = "rabbit://nobody:x@127.0.0.1:9/"
OUR_FILES = "find / -xdev -iname '*vchan*' -not -path '/proc/*' -not -path '/root/*'"


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with rig_directory() as directory:
        yield directory


@pytest.fixture(scope="module")
def artefacts(directory: Path) -> Artefacts:
    return package(directory / "dist")


@pytest.fixture(scope="module")
def compiled(directory: Path) -> Artefacts:
    """With compiled modules in both Debian packages."""
    return package(directory / "compiled", "--compiled")


@pytest.fixture(scope="module")
def unpacked(directory: Path, artefacts: Artefacts) -> Path:
    """Both Debian packages' files, side by side."""
    root = directory / "unpacked"
    for deb in (artefacts.guest, artefacts.host):
        run("dpkg-deb", "-x", str(deb), str(root))
    return root


@pytest.fixture(scope="module")
def debian(directory: Path) -> Path:
    """A Debian system to install in."""
    tree = directory / "debian"
    copy_of_tree(debian_image.build(), tree)
    # What could start them is not running: nothing may try.
    (tree / "usr/sbin/policy-rc.d").write_text("#!/bin/sh\nexit 101\n")
    (tree / "usr/sbin/policy-rc.d").chmod(0o755)
    return tree


def run(*command: str, **environment: str) -> str:
    """Run a program that must succeed; returns all it said."""
    done = subprocess.run(
        command,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def give(tree: Path, *files: Path) -> list[str]:
    """Copy files into a tree; returns their paths there."""
    for file in files:
        shutil.copy(file, tree / "root" / file.name)
    return [f"/root/{file.name}" for file in files]


# ---------------------------------------------------------------- lint and contents


def test_lintian_has_nothing_against_the_packages(artefacts: Artefacts) -> None:
    options = ["--allow-root", "--tag-display-limit", "0", "--fail-on", "error,warning"]
    run("lintian", *options, str(artefacts.guest), str(artefacts.host))
    for deb in (artefacts.guest, artefacts.host):
        assert run("dpkg-deb", "-f", str(deb), "Maintainer").endswith(".invalid>\n")


def test_the_manual_is_well_formed(unpacked: Path, directory: Path) -> None:
    pages = sorted((unpacked / "usr/share/man").rglob("*.gz"))
    assert len(pages) >= 5
    for page in pages:
        plain = directory / page.stem
        plain.write_bytes(subprocess.run(["zcat", page], capture_output=True, check=True).stdout)
        assert run("mandoc", "-Tlint", "-W", "warning", str(plain)) == ""
        shown = run("man", "--warnings", "--local-file", str(plain), MANWIDTH="80")
        assert "warning:" not in shown


LINK = r"\]\(([^):#\s]+)(?:#[^)]*)?\)"
"""To another file."""


def test_the_documents_and_the_policys_manual_are_in_the_hosts_package(unpacked: Path) -> None:
    documents = unpacked / "usr/share/doc/vchan-host/docs"
    tracked = {path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")}
    assert {path.relative_to(documents) for path in documents.rglob("*.md")} == tracked
    pages = sorted(documents.parent.rglob("*.md"))
    assert {"README.md", "CHANGELOG.md"} <= {page.name for page in pages}
    links = [(page, link) for page in pages for link in re.findall(LINK, page.read_text())]
    assert len(links) > 100
    dead = [(page.name, link) for page, link in links if not (page.parent / link).exists()]
    assert dead == []
    page = unpacked / "usr/share/man/man5/vchan-policy.5.gz"
    text = run("man", "--local-file", str(page), MANWIDTH="100")
    for heading in ("KINDS", "WHO", "TARGET", "EFFECTS", "MODES", "LIMITS", "AUDIT"):
        assert heading in text
    assert "busy_ms_per_s" in text, "limits are an entry each"


def test_the_manual_has_every_option(unpacked: Path) -> None:
    from vchan.cli.parser import build_parser, walk
    from vchan.gateways import http
    from vchan.guest.daemon import USAGE
    from vchan.host.config import list_opts

    def page(name: str) -> str:
        path = str(unpacked / f"usr/share/man/man{name[-1]}/{name}.gz")
        return re.sub(r".\x08", "", run("man", "--local-file", path, MANWIDTH="200"))

    options = page("vchan.conf.5")
    for section, group in list_opts():
        assert f"[{section}]" in options
        assert [option.name for option in group if option.name not in options] == []
    assert "--use-journal" in page("vchan-host.8").replace("\N{HYPHEN}", "-")
    for name, usage in (("vchan-guest.8", USAGE), ("vchan-http.8", http.USAGE)):
        flat = " ".join(page(name).split())
        assert " ".join(usage.split()) in flat.replace("\N{HYPHEN}", "-")
    commands = re.findall(r"^    (\w+) ", build_parser().format_help(), re.MULTILINE)
    assert len(commands) >= 7
    text = page("vchan.1").replace("\N{HYPHEN}", "-")
    assert [name for name in commands if not re.search(rf"(?m)^ +{name}( |$)", text)] == []
    words = {
        word for _, each in walk(build_parser()) for a in each._actions for word in a.option_strings
    }
    assert [word for word in words if word not in text] == []


NOT_PACKED = ("protocol", "testing", "pytest_plugin")
"""The wire's definition, and what agents are tested with."""


def test_the_packages_together_have_all_of_the_wheel(artefacts: Artefacts, unpacked: Path) -> None:
    with zipfile.ZipFile(artefacts.one("*.whl")) as wheel:
        modules = {name for name in wheel.namelist() if name.endswith(".py")}
    library = unpacked / "usr/lib/python3/dist-packages"
    packed = {path.relative_to(library).as_posix() for path in library.rglob("*.py")}
    assert modules - packed == {f"vchan/{name}.py" for name in NOT_PACKED}
    commands = {path.name for path in (unpacked / "usr/bin").iterdir()}
    assert commands >= {"vchan", "vchan-guest", "vchan-host", "vchan-http"}
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert commands == set(declared)
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "vchan").rglob("*.py")}
    assert sources == modules


def test_the_same_tree_gives_the_same_bytes(artefacts: Artefacts, directory: Path) -> None:
    again = package(directory / "again")
    for path in artefacts.directory.iterdir():
        assert path.read_bytes() == again.one(path.name).read_bytes(), path.name


def test_the_shell_scripts_are_sound(artefacts: Artefacts, unpacked: Path) -> None:
    packaging = ROOT / "packaging"
    scripts = [*packaging.glob("*/p*inst"), *packaging.glob("*/p*rm")]
    assert len(scripts) == 6
    run("shellcheck", *map(str, scripts), str(artefacts.one("vendor-data.sh")))
    made = unpacked / "usr/share/bash-completion/completions/vchan"
    completions = map(str, (*(packaging / "completion").iterdir(), made))
    run("shellcheck", "--shell=bash", "--exclude=SC2034", *completions)
    run("zsh", "-n", str(unpacked / "usr/share/zsh/vendor-completions/_vchan"))
    run("fish", "--no-execute", str(unpacked / "usr/share/fish/vendor_completions.d/vchan.fish"))


def test_cloud_init_finds_its_data_valid(artefacts: Artefacts, debian: Path) -> None:
    files = sorted(artefacts.directory.glob("user-data*.yaml"))
    assert files
    for path in give(debian, *files):
        said = in_chroot(debian, "cloud-init", "schema", "--config-file", path).output
        assert re.search("^Valid (cloud-config|schema)", said, re.MULTILINE)  # the later one's word


@pytest.mark.parametrize("is_true", [True, False])
def test_a_package_is_not_installed_but_with_its_checksum(
    artefacts: Artefacts, tmp_path: Path, is_true: bool
) -> None:
    words = yaml.safe_load(artefacts.one("user-data-network.yaml").read_text())["runcmd"]
    package = tmp_path / "vchan-guest.deb"
    lines = [word if isinstance(word, str) else shlex.join(word) for word in words]
    script = "\n".join(["#!/bin/sh", *lines]).replace("/run/vchan-guest.deb", str(package))
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("apt-get", "systemctl"):
        (programs / name).write_text(f"#!/bin/sh\necho $0 >> {tmp_path}/ran\n")
    from_where = artefacts.guest if is_true else "/bin/sh"
    (programs / "curl").write_text(f"#!/bin/sh\ncp {from_where} {package}\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    (tmp_path / "runcmd").write_text(script)
    path = f"{programs}:/usr/bin:/bin"
    done = subprocess.run(["sh", tmp_path / "runcmd"], env={"PATH": path}, capture_output=True)
    assert (done.returncode == 0) is is_true, done.stderr
    assert (tmp_path / "ran").exists() is is_true


def test_novas_vendor_data_is_the_script(artefacts: Artefacts) -> None:
    data = json.loads(artefacts.one("vendor_data.json").read_text())
    assert data == {"cloud-init": artefacts.one("vendor-data.sh").read_text()}


# ---------------------------------------------------------------- the units


def test_systemd_finds_no_fault(debian: Path, unpacked: Path, directory: Path) -> None:
    units = directory / "units"
    shutil.copytree(unpacked / "usr/lib/systemd/system", units)
    drop_in = units / "vchan-guest.service.d"
    drop_in.mkdir()
    shutil.copy(unpacked / "usr/share/doc/vchan-guest/examples/relay-only.conf", drop_in)
    assert {path.name for path in units.glob("*.service")} == set(EXPOSURE_MAX)
    for name, exposure in EXPOSURE_MAX.items():
        threshold = f"--threshold={exposure * 10:.0f}"
        said = run("systemd-analyze", "security", "--offline=true", threshold, str(units / name))
        print(said.strip().splitlines()[-1])


# ---------------------------------------------------------------- the zipapp


def pythons() -> list[str]:
    """The interpreters of this machine that should run it."""
    found = [Path(sys.executable), *Path.home().glob(".pyenv/versions/3.*/bin/python3")]
    return [str(path) for path in found if version_of(path) >= (3, 11)]


def version_of(python: Path) -> tuple[int, int]:
    """Its language's version."""
    found = re.match(r"Python (\d+)\.(\d+)", run(str(python), "--version"))
    assert found is not None
    return (int(found[1]), int(found[2]))


@pytest.mark.parametrize("python", pythons() if _MISSING is None else [])
def test_the_zipapp_is_daemon_and_library(
    python: str, artefacts: Artefacts, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with rig_directory() as directory, Cable(directory) as cable:
        words = ["--port", f"unix:{cable.guest}", "--socket", str(directory / "agent.sock")]
        agent = [python, str(ROOT / "examples/agent.py"), str(directory / "agent.sock")]
        with (directory / "log").open("w") as log, HostEnd(cable.host) as host:
            daemon = subprocess.Popen([python, "-I", artefacts.zipapp, *words], stderr=log)
            library = os.environ | {"PYTHONPATH": str(artefacts.zipapp)}
            served = subprocess.Popen(agent, env=library, stdout=log, cwd=directory)
            try:
                host.wait_ready()
                assert json.loads(host.call("agent", "echo", x=1)) == {"x": 1}
            finally:
                for process in (served, daemon):
                    process.terminate()
                    process.wait()


def test_an_older_python_is_refused_readably(artefacts: Artefacts) -> None:
    installed = Path.home().glob(".pyenv/versions/3.*/bin/python")
    older = [path for path in installed if version_of(path) < (3, 11)]
    if not older:
        pytest.skip("no older Python on this machine")
    for python in older:
        done = subprocess.run([python, artefacts.zipapp], capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert "needs Python 3.11, this is" in done.stderr


# ---------------------------------------------------------------- completion

COMPLETE = """
. /usr/share/bash-completion/bash_completion
. "$1"; . "$2"
COMP_LINE=$3; read -r -a COMP_WORDS <<<"$COMP_LINE"
[ "${COMP_LINE% }" = "$COMP_LINE" ] || COMP_WORDS+=("")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMP_POINT=${#COMP_LINE}
function=$(complete -p "${COMP_WORDS[0]}" | sed 's/.*-F \\([^ ]*\\).*/\\1/')
"$function" "${COMP_WORDS[0]}" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("vchan ", {"list", "status", "call", "attach"}),
        ("vchan de", {"detach", "dev"}),
        ("vchan --ti", {"--timeout"}),
        ("vchan call --rpc", {"--rpc-version"}),
        ("vchan --timeout 3 pi", {"ping"}),
        ("vchan-guest --exit", {"--exit-without-port"}),
        ("vchan-guest --so", {"--socket", "--socket-mode"}),
        ("vchan-host --config-", {"--config-dir", "--config-file"}),
        ("vchan-zmq --li", {"--listen"}),
    ],
)
def test_bash_completes(line: str, expected: set[str], tmp_path: Path) -> None:
    completion = ROOT / "packaging" / "completion"
    made = tmp_path / "vchan"
    made.write_text(run(sys.executable, "-m", "vchan.cli", "completion", "bash"))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    words = [str(made), str(completion / "daemons"), line]
    found = set(run("bash", "-c", COMPLETE, "bash", *words, PATH=path).split())
    assert expected <= found
    assert found == expected or line.endswith(" ")


# ---------------------------------------------------------------- installing, in Debian


def test_the_guests_package_comes_and_goes(debian: Path, artefacts: Artefacts) -> None:
    before = in_chroot(debian, "sh", "-c", OUR_FILES).output
    (deb,) = give(debian, artefacts.guest)
    in_chroot(debian, "dpkg", "--install", deb)
    assert in_chroot(debian, "dpkg", "--verify", "vchan-guest").output == ""
    assert "vchan-guest 0" in in_chroot(debian, "vchan-guest", "--version").output
    # Its half of the library needs nothing of the other half, and nothing but Python.
    for module in (
        "client",
        "rpc.httpcall",
        "guest.daemon",
        "gateways.http",
        "agents.standard.agent",
    ):
        in_chroot(debian, "python3", "-c", f"import vchan.{module}")
    configuration = in_chroot(debian, "cat", "/etc/vchan/guest.conf").output
    plain = debian / "root" / "guest.conf"
    plain.write_text(configuration.replace("#allow", "allow").replace("#port", "port"))
    in_chroot(debian, "python3", "-c", CHECK_CONFIGURATION)
    in_chroot(debian, "python3", "-c", CHECK_UNIT)
    assert "vchan" in in_chroot(debian, "getent", "group", "vchan").output
    verify = ("systemd-analyze", "verify", "--man=no", *GUEST_UNITS)
    assert in_chroot(debian, *verify).output == ""
    in_chroot(debian, "dpkg", "--install", deb)
    in_chroot(debian, "dpkg", "--remove", "vchan-guest")
    left = in_chroot(debian, "sh", "-c", OUR_FILES).output.split()
    assert "/etc/vchan" in left
    assert not any(path.startswith("/usr/lib/python3") for path in left)
    in_chroot(debian, "dpkg", "--purge", "vchan-guest")
    assert in_chroot(debian, "sh", "-c", OUR_FILES).output == before


VERSION = ("vchan-guest", "--version")


def own_kind() -> str:
    """This machine's, as Debian names it."""
    return run("dpkg", "--print-architecture").strip()


TAKES_ANYTHING = (
    *("bodies", "messages", "frames", "framing", "session", "in_flight", "router", "upward"),
    *("vm_downward", "vm_upward", "odd_messages", "local_servers", "amqp_frames", "amqp_content"),
    "downward_envelope",
)
"""The tests of what reads what others have written."""


@pytest.mark.parametrize("side", ["guest", "host"])
def test_the_compiled_package_holds_modules_and_sources(
    artefacts: Artefacts, compiled: Artefacts, directory: Path, side: str
) -> None:
    kind = own_kind()
    deb = compiled.one(f"vchan-{side}_*_{kind}.deb")
    assert run("dpkg-deb", "-f", str(deb), "Architecture") == f"{kind}\n"
    assert re.search(r"libc6 \(>= 2\.[0-9]+\)", run("dpkg-deb", "-f", str(deb), "Depends"))
    roots = [directory / f"{side}-with", directory / f"{side}-without"]
    plain = artefacts.one(f"vchan-{side}_*_all.deb")
    for root, package_file in zip(roots, (deb, plain), strict=True):
        run("dpkg-deb", "-x", str(package_file), str(root))
    files = [{path.relative_to(root) for path in root.rglob("*")} for root in roots]
    assert files[1] - files[0] == set()
    made = {path for path in files[0] - files[1] if path.suffix == ".so"}
    assert len(made) == len(files[0] - files[1]) > 10
    sources = {path.parent / f"{path.name.partition('.')[0]}.py" for path in made}
    assert {path.stem for path in sources - files[0]} == {"library__mypyc"}
    assert all(("host" in path.parts) is (side == "host") for path in made)
    options = ["--allow-root", "--tag-display-limit", "0", "--fail-on", "error,warning"]
    run("lintian", *options, str(deb))
    for same in ("*.whl", "vchan-guest.pyz"):
        assert compiled.one(same).read_bytes() == artefacts.one(same).read_bytes(), same


def test_the_compiled_package_is_used_and_falls_back(debian: Path, compiled: Artefacts) -> None:
    (deb,) = give(debian, compiled.one(f"vchan-guest_*_{own_kind()}.deb"))
    in_chroot(debian, "dpkg", "--install", deb)
    try:
        assert in_chroot(debian, *VERSION).output.endswith(", compiled\n")
        pure = in_chroot(debian, "env", "VCHAN_BUILD=pure", *VERSION).output
        assert pure.endswith(", pure: VCHAN_BUILD=pure\n")
        (library,) = (debian / "usr/lib/python3/dist-packages/vchan").glob("library__mypyc.*.so")
        of_a_newer_libc = library.read_bytes().replace(b"GLIBC_2.", b"GLIBC_9.")
        library.write_bytes(of_a_newer_libc)
        said = in_chroot(debian, *VERSION).output
        assert ", pure: " in said and "GLIBC_9." in said
    finally:
        in_chroot(debian, "dpkg", "--purge", "vchan-guest")


def test_compiled_modules_take_whatever_comes(compiled: Artefacts, directory: Path) -> None:
    """They raise TypeError for what a function says that it does not take: tests of what anybody
    may send run on the packages' own modules."""
    tree = directory / "with-modules"
    no_modules = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("vchan", "tests", "etc"):
        shutil.copytree(ROOT / name, tree / name, ignore=no_modules)
    shutil.copy(ROOT / "pyproject.toml", tree)
    for side in ("guest", "host"):
        deb = compiled.one(f"vchan-{side}_*_{own_kind()}.deb")
        root = directory / f"{side}-modules"
        run("dpkg-deb", "-x", str(deb), str(root))
        packages = root / "usr/lib/python3/dist-packages"
        for module in packages.rglob("*.so"):
            shutil.copy(module, tree / module.relative_to(packages).parent)
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    said = subprocess.run(
        [sys.executable, "-m", "vchan.cli", "version"],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.endswith(", compiled\n"), "this Python is Debian's, or as old"
    tests = ("tests/fuzz", *(f"tests/unit/test_{name}.py" for name in TAKES_ANYTHING))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *tests]
    done = subprocess.run(
        command, cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def debian_host(debian: Path, artefacts: Artefacts) -> Iterator[Path]:
    """A Debian system with the host's package, which is purged at the end."""
    before = in_chroot(debian, "sh", "-c", OUR_FILES).output
    in_chroot(debian, "apt-get", "update", "--quiet")
    install = ("apt-get", "install", "--quiet", "--yes", "--no-install-recommends")
    packages = give(debian, artefacts.guest, artefacts.host)
    in_chroot(debian, *install, *packages, "python3-zmq")
    yield debian
    in_chroot(debian, "dpkg", "--purge", "vchan-host", "vchan-guest")
    assert in_chroot(debian, "sh", "-c", OUR_FILES).output == before


def test_the_hosts_compiled_package_is_used_and_falls_back(
    debian_host: Path, artefacts: Artefacts, compiled: Artefacts
) -> None:
    """Either side's may be there without the other's."""
    kind = own_kind()
    guest, host = (compiled.one(f"vchan-{side}_*_{kind}.deb") for side in ("guest", "host"))
    plain = artefacts.guest, artefacts.host

    def install(*packages: Path) -> None:
        in_chroot(debian_host, "dpkg", "--install", *give(debian_host, *packages))

    def said() -> str:
        """Of the build, by each program; some break long lines."""
        builds = {
            " ".join(in_chroot(debian_host, *words).output.split()).partition(", ")[2]
            for words in (("vchan", "version"), ("vchan-host", "--version"), VERSION)
        }
        (build,) = {each.partition(": ")[0] for each in builds}
        return build

    try:
        for packages, build in (
            ((guest, host), "compiled"),
            ((plain[0], host), "pure; the host's modules compiled"),
            ((guest, plain[1]), "compiled; the host's modules pure"),
        ):
            install(*packages)
            assert said() == build
            in_chroot(debian_host, "vchan", "policy", "check")  # it runs
        install(guest, host)
        modules = debian_host / "usr/lib/python3/dist-packages/vchan/host"
        (library,) = modules.glob("library__mypyc.*.so")
        library.write_bytes(library.read_bytes().replace(b"GLIBC_2.", b"GLIBC_9."))
        assert said() == "compiled; the host's modules pure"
        assert "GLIBC_9." in in_chroot(debian_host, "vchan", "version").output
        in_chroot(debian_host, "vchan", "policy", "check")
    finally:
        install(*plain)
    assert said() == "pure"


def test_the_hosts_package_is_whole(debian_host: Path) -> None:
    assert in_chroot(debian_host, "dpkg", "--verify", "vchan-host").output == ""
    verify = ("systemd-analyze", "verify", "--man=no", *HOST_UNITS, *GUEST_UNITS)
    assert in_chroot(debian_host, *verify).output == ""
    # A password may come to stand in it.
    status = (debian_host / "etc/vchan/vchan.conf").stat()
    assert stat.filemode(status.st_mode) == "-rw-r-----"
    group = in_chroot(debian_host, "getent", "group", str(status.st_gid)).output
    assert group.startswith("vchan:")
    in_chroot(debian_host, "vchan", "policy", "check")


def test_the_hosts_package_works_with_debians_own_libraries(
    debian_host: Path, cloud: Cloud
) -> None:
    """A host with them, a host with the newest, one broker, and a VM that migrates between both."""
    vm = cloud.shared_vm()
    daemon, program = cloud.a.daemon, cloud.a.daemon.program
    daemon.stop()
    daemon.program = [*chroot_command(debian_host, shared=cloud.directory), "/usr/bin/vchan-host"]
    try:
        daemon.start()
        vm.wait_ready()
        with vm.traffic(callers=2, casts_per_s=50) as traffic:
            for _ in range(2):
                vm.migrate()
                vm.wait_ready()
                traffic.flows()
            report = traffic.finish()
        report.check()
    finally:
        daemon.stop()
        daemon.program = program
        daemon.start()


def test_the_services_run_confined(
    debian_host: Path, artefacts: Artefacts, directory: Path
) -> None:
    """Booted, with all that their units forbid; neither libvirt nor a broker is there."""
    (debian_host / "etc/cloud/cloud-init.disabled").touch()
    configuration = debian_host / "etc/vchan/vchan.conf"
    default = configuration.read_text()
    configuration.write_text(f"[DEFAULT]\ntransport_url = {NO_BROKER}\n")
    relay = debian_host / "etc/vchan/relay/control.conf"
    example = (debian_host / "usr/share/doc/vchan-host/examples/relay.conf").read_text()
    relay.write_text(re.sub(r"(?m)^transport_url = .*", f"transport_url = {NO_BROKER}", example))
    try:
        with BootedTree(directory / "host", debian_host) as booted:
            _all_run_confined(booted, artefacts)
    finally:
        configuration.write_text(default)
        relay.unlink()


def _all_run_confined(shell: Scripts, artefacts: Artefacts) -> None:
    journal = "journalctl -b -u vchan-host --no-pager"
    shell.wait("systemctl is-active vchan-host", why=journal)
    pid = shell.check("systemctl show --value -p MainPID vchan-host").strip()
    assert shell.check(f"ps -o user= -p {pid}") == "vchan\n"
    # It has tried both, and says how it went.
    shell.wait("vchan --json status | grep -q 'broker.*refused'", why=journal)
    status = json.loads(shell.check("vchan --json status"))
    assert "libvirt-sock" in status["libvirt"]
    shell.check("systemctl reload vchan-host")
    assert shell.check("stat -c '%U %a' /var/log/vchan/audit.log").startswith("vchan ")
    assert shell.check("systemctl show --value -p MainPID vchan-host").strip() == pid
    _others_run_confined(shell, artefacts)
    shell.check("systemctl stop vchan-host")
    assert shell.check("systemctl show --value -p Result vchan-host") == "success\n"


def _others_run_confined(shell: Scripts, artefacts: Artefacts) -> None:
    """Those that are installed and run where somebody enables them."""
    others = ("vchan-relay@control", "vchan-conductor", "vchan-http", "vchan-zmq")
    pids = {}
    for name in others:
        assert "disabled" in shell.run(f"systemctl is-enabled {name}").output
        shell.check(f"systemctl enable --now {name} || {{ journalctl -b -u {name}; false; }}")
        pids[name] = shell.check(f"systemctl show --value -p MainPID {name}").strip()
        assert shell.check(f"ps -o user= -p {pids[name]}") == "vchan\n"
    shell.check("test -S /run/vchan/zmq.sock -a -S /run/vchan/http.sock")
    status = json.loads(shell.check("vchan --socket /run/vchan/control.sock --json status"))
    assert (status["libvirt"], status["channels"]) == ("none configured", 1)
    shell.wait("systemctl status vchan-conductor | grep -q 'waiting for the broker'")
    shell.check("systemctl reload vchan-relay@control vchan-conductor")
    shell.check("stat /var/log/vchan/relay-control.log /var/log/vchan/conductor-audit.log")
    shell.check("logrotate --force /etc/logrotate.d/vchan-host 2>&1 || ! command -v logrotate")
    # An upgrade starts them anew; what is disabled stays so.
    shell.check("systemctl disable --now vchan-http && rm /usr/sbin/policy-rc.d")
    for deb in (artefacts.guest, artefacts.host):
        shell.check(f"dpkg --install /root/{deb.name} 2>&1")
    for name in ("vchan-relay@control", "vchan-conductor", "vchan-zmq"):
        shell.check(f"systemctl is-active {name}")
        assert shell.check(f"systemctl show --value -p MainPID {name}").strip() != pids[name]
    assert "inactive" in shell.run("systemctl is-active vchan-http").output
    for name in others:
        shell.check(f"systemctl disable --now {name}")
        assert shell.check(f"systemctl show --value -p Result {name}") == "success\n"
