"""Builds what users install: Debian packages, rpms, a zipapp, the wheel, cloud-init's data.

    scripts/package [--output DIR] [--deb-version VERSION] [--maintainer WHO] [--url URL]
                    [--rpm DIST=PYTHON]... [--compiled]

Everything is made from the wheel, so that no file is in one and forgotten in another. With the same
tree, the same SOURCE_DATE_EPOCH (default: the last commit's date) and the same Python, the same
bytes come out.
"""

import argparse
import base64
import functools
import gzip
import hashlib
import importlib
import json
import os
import posixpath
import py_compile
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parent
NO_MAINTAINER = "unnamed maintainer <unnamed@vchan.invalid>"
"""Debian wants somebody to write to. That is who builds the packages and hands them out: if they do
not say, nobody can mistake this for an address (RFC 2606)."""
HOST_PART = re.compile(r"vchan/(host/|conductor/|cli/)")
"""What the host's package holds of the library; the guest's holds the rest."""
GUEST_PROGRAMS = ("vchan.guest.", "vchan.gateways.")
"""Where the modules of the guest's commands are."""
RECOMMENDED = ("prometheus-client",)
"""What the host's side can do without."""
UNUSED = re.compile(r"vchan/(protocol|testing|pytest_plugin)\.py")
"""The wire's definition: what runs is generated from it. And what agents are tested with:
authors have it from pip."""
COMPLETIONS = {
    "bash": "usr/share/bash-completion/completions/vchan",
    "zsh": "usr/share/zsh/vendor-completions/_vchan",
    "fish": "usr/share/fish/vendor_completions.d/vchan.fish",
}
"""Where Debian's shells look for vchan's words."""
PAGES = ("README.md", "CHANGELOG.md")
"""What of this directory goes with the documents."""
DOCUMENTED = {
    "docs/": "vchan-host/docs/",
    "examples/": "vchan-guest/examples/",
    "libvirt/": "vchan-host/examples/libvirt/",
    "etc/grafana/": "vchan-host/examples/grafana/",
    "etc/prometheus/": "vchan-host/examples/prometheus/",
    "packaging/guest/vchan-guest.openrc": "vchan-guest/examples/vchan-guest.openrc",
    **{page: f"vchan-host/{page}" for page in PAGES},
}
"""Where the packages have what documents point to, below /usr/share/doc; what ends in / is a
directory."""
LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<path>[^):#\s]+)(?P<part>#[^)]*)?\)")

LAUNCHER = """\
#!{python} -I
from {module} import main

main()
"""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="scripts/package", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="[%(default)s]")
    parser.add_argument("--deb-version", help="of the Debian packages [the project's]")
    parser.add_argument(
        "--maintainer",
        default=maintainer(),
        metavar="'NAME <ADDRESS>'",
        help="of the Debian packages, as DEBFULLNAME and DEBEMAIL [%(default)s]",
    )
    parser.add_argument(
        "--url",
        default="http://packages.example.org",
        help="where VMs fetch the .deb [%(default)s]",
    )
    parser.add_argument(
        "--rpm",
        metavar="DIST=PYTHON",
        type=rpm_target,
        action="append",
        default=[],
        help="also rpms, for a distribution and its Python: el9=3.11; may be given several times",
    )
    parser.add_argument(
        "--compiled",
        action="store_true",
        help="both Debian packages with compiled modules, too: for this machine's kind, and this "
        "Python, which is to be Debian's; needs gcc and mypy",
    )
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    os.environ["SOURCE_DATE_EPOCH"] = str(source_date())
    os.environ["COLUMNS"] = "78"  # of what programs say of themselves
    with tempfile.TemporaryDirectory(prefix="vchan-package-") as directory:
        build(Path(directory), options)


def maintainer() -> str:
    """Who is to be written to, as Debian's own tools are told it."""
    name, address = os.environ.get("DEBFULLNAME"), os.environ.get("DEBEMAIL")
    return f"{name} <{address}>" if name and address else NO_MAINTAINER


def rpm_target(text: str) -> tuple[str, str]:
    """(distribution, Python's version)."""
    found = re.fullmatch(r"([a-z]+[0-9]+)=(3\.[0-9]+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no DIST=PYTHON, as el9=3.11")
    return found[1], found[2]


def source_date() -> int:
    """The date that everything carries: SOURCE_DATE_EPOCH, or the last commit's."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if given:
        return int(given)
    return int(run("git", "log", "-1", "--format=%ct") or 0)


def build(work: Path, options: argparse.Namespace) -> None:
    """Make every artefact; prints their names."""
    wheel = build_wheel(work)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(work / "wheel")
    version = wheel.name.split("-")[1]
    if options.compiled:
        run(
            sys.executable, str(HERE / "compiled.py"), str(work / "wheel"), str(work / "extensions")
        )
    debian = Debian(work, options.deb_version or version, options.maintainer)
    made = [wheel, build_zipapp(work), debian.guest(), debian.host()]
    for dist, python in options.rpm:
        made += Rpm(work, version, options.maintainer, dist, python).build()
    made += cloud_init(work, made[1], made[2], options.url)
    for artefact in made:
        shutil.copy(artefact, options.output / artefact.name)
        print(options.output / artefact.name)


def build_wheel(work: Path) -> Path:
    """The wheel, from a copy: setuptools leaves its traces in the tree."""
    tree = work / "tree"
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("vchan", "pyproject.toml", "README.md", "LICENSE"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=skip)
        else:
            shutil.copy(source, tree / name)
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps")
    run(*pip, "--wheel-dir", str(work / "dist"), str(tree))
    return next((work / "dist").glob("*.whl"))


# ---------------------------------------------------------------- the zipapp


def build_zipapp(work: Path) -> Path:
    """One file that any Python 3.11 or later runs: the guest's daemon, and the library.

    Beside each source lies what this Python compiled it to: zipimport takes that if it is of the
    same version, which halves the start, and the source otherwise.
    """
    target = work / "vchan-guest.pyz"
    files = guest_files(work / "wheel" / "vchan")
    files["__main__.py"] = (HERE / "zipapp" / "__main__.py").read_bytes()
    for name, content in compiled(files, work / "compiled").items():
        files[name] = content
    with target.open("wb") as out:
        out.write(b"#!/usr/bin/env python3\n")
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for name in sorted(files):
                info = zipfile.ZipInfo(name, zip_date())
                info.compress_type = zipfile.ZIP_DEFLATED
                info.external_attr = 0o644 << 16
                archive.writestr(info, files[name])
    target.chmod(0o755)
    return target


def guest_files(package: Path) -> dict[str, bytes]:
    """The library as a guest needs it, by path."""
    root = package.parent
    names = {path.relative_to(root).as_posix(): path for path in package.rglob("*.py")}
    return {
        name: path.read_bytes()
        for name, path in names.items()
        if not is_host(name) and not UNUSED.match(name)
    }


def compiled(files: dict[str, bytes], work: Path) -> dict[str, bytes]:
    """What this Python compiles the sources to. No dates in it: a zip's are too coarse."""
    out = {}
    for name, source in files.items():
        path = work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source)
        mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
        result = path.with_suffix(".pyc")
        py_compile.compile(str(path), str(result), name, doraise=True, invalidation_mode=mode)
        out[name + "c"] = result.read_bytes()
    return out


def zip_date() -> tuple[int, int, int, int, int, int]:
    """The source's date, as zip files have it."""
    date = datetime.fromtimestamp(source_date(), UTC)
    return (max(date.year, 1980), date.month, date.day, date.hour, date.minute, date.second)


# ---------------------------------------------------------------- packages


class Layout(NamedTuple):
    """Where a distribution has things.

    Attributes:
        library: Where its Python looks for modules.
        python: That Python.
        system: Above systemd's and udev's own directories.
    """

    library: str
    python: str
    system: str


class Packages:
    """What both sides' packages hold, as trees; packed by those below.

    Args:
        work: For the trees; the wheel lies unpacked in it.
    """

    def __init__(self, work: Path, wheel: Path, layout: Layout) -> None:
        self._work = work
        self._wheel = wheel
        self._layout = layout

    def guest_tree(self) -> "Tree":
        """vchan-guest: the daemon in a VM, and the library, which the host's package uses too."""
        tree = Tree(self._work / "vchan-guest")
        library, system = self._layout.library, self._layout.system
        for name, content in guest_files(self._wheel / "vchan").items():
            tree.write(f"{library}/{name}", content)
        tree.write(f"{library}/vchan/py.typed", b"")
        metadata = next(self._wheel.glob("*.dist-info"))
        for name in ("METADATA", "entry_points.txt"):
            tree.copy(metadata / name, f"{library}/{metadata.name}/{name}")
        source = HERE / "guest"
        for unit in sorted(source.glob("*.service")):
            tree.copy(unit, f"{system}/systemd/system/{unit.name}")
        self._commands(tree, lambda module: module.startswith(GUEST_PROGRAMS))
        tree.copy(source / "60-vchan-guest.rules", f"{system}/udev/rules.d/60-vchan-guest.rules")
        tree.copy(source / "sysusers.conf", "usr/lib/sysusers.d/vchan.conf")
        tree.copy(source / "tmpfiles.conf", "usr/lib/tmpfiles.d/vchan.conf")
        tree.write("etc/vchan/guest.conf", guest_configuration().encode())
        tree.directory("etc/vchan/agents.d")
        tree.directory("etc/vchan/freeze-hooks.d")
        tree.copy_documents("vchan-guest", "relay-only.conf", source / "relay-only.conf")
        tree.copy_documents("vchan-guest", "vchan-guest.openrc", source / "vchan-guest.openrc")
        for example in sorted((ROOT / "examples").rglob("*")):
            if example.is_file() and "__pycache__" not in example.parts:
                name = example.relative_to(ROOT / "examples").as_posix()
                tree.copy_documents("vchan-guest", name, example)
        return tree

    def host_tree(self) -> "Tree":
        """vchan-host: the daemon of a compute host, and the operator's command."""
        tree = Tree(self._work / "vchan-host")
        for path in (self._wheel / "vchan").rglob("*.py"):
            name = path.relative_to(self._wheel).as_posix()
            if is_host(name):
                tree.copy(path, f"{self._layout.library}/{name}")
        self._commands(tree, lambda module: not module.startswith(GUEST_PROGRAMS))
        source = HERE / "host"
        for unit in sorted((*source.glob("*.service"), *source.glob("*.socket"))):
            tree.copy(unit, f"{self._layout.system}/systemd/system/{unit.name}")
        tree.write("etc/vchan/vchan.conf", host_configuration().encode())
        tree.copy(source / "logrotate", "etc/logrotate.d/vchan-host")
        policy = "policy.d/90-default.policy"
        tree.copy(ROOT / "etc" / policy, f"etc/vchan/{policy}")
        tree.directory("etc/vchan/conductor.d")
        tree.directory("etc/vchan/forward.d")
        tree.directory("etc/vchan/proxy")
        tree.directory("etc/vchan/relay")
        tree.copy_documents("vchan-host", "relay.conf", source / "relay.conf")
        for example in sorted((ROOT / "libvirt").glob("*.xml")):
            tree.copy_documents("vchan-host", f"libvirt/{example.name}", example)
        for name in ("grafana/vchan.json", "prometheus/vchan.rules.yaml"):
            tree.copy_documents("vchan-host", name, ROOT / "etc" / name)
        tree.manual("vchan.conf.5", OPTIONS=host_options(), HONOURED=host_honoured())
        for page in manual_of_documents(self._work / "man"):
            # mandoc has a paragraph begin at a heading by itself.
            text = re.sub(r"(?m)^(\.S[HS] .*\n)\.sp\n", r"\1", page.read_text())
            tree.write_zipped(f"usr/share/man/man{page.suffix[1:]}/{page.name}.gz", text)
        self._documents(tree)
        return tree

    def _documents(self, tree: "Tree") -> None:
        """The documents, with links to where things are in the packages."""
        found = ((ROOT / "docs").rglob("*.md"), (ROOT / "libvirt").glob("*.md"))
        for page in sorted((*found[0], *found[1], *(ROOT / page for page in PAGES))):
            name = page.relative_to(ROOT).as_posix()
            place = f"usr/share/doc/{place_in_packages(name)}"
            tree.write(place, with_links_of_packages(name, page.read_text()).encode())
        for picture in sorted((ROOT / "docs" / "pictures").glob("*.svg")):
            tree.copy(picture, f"usr/share/doc/vchan-host/docs/pictures/{picture.name}")

    def _commands(self, tree: "Tree", wanted: Callable[[str], bool]) -> None:
        """The wheel's commands whose module is wanted, and a manual page for each."""
        found = next(self._wheel.glob("*.dist-info/entry_points.txt")).read_text()
        scripts = found.partition("[console_scripts]")[2].partition("[")[0]
        for name, module in re.findall(r"^(\S+) = (\S+):main$", scripts, re.MULTILINE):
            if wanted(module):
                tree.launcher(name, module, self._layout.python)
                tree.manual_of(name, module)
                if name == "vchan":
                    for shell, path in COMPLETIONS.items():
                        tree.write(path, completion(shell).encode())
                else:
                    bash = COMPLETIONS["bash"].replace("vchan", name)
                    tree.copy(HERE / "completion" / "daemons", bash)


class Debian(Packages):
    """Makes the packages with dpkg-deb alone.

    Args:
        version: Of both packages; one needs exactly the other.
        maintainer: Who is to be written to about them.
    """

    def __init__(self, work: Path, version: str, maintainer: str) -> None:
        layout = Layout("usr/lib/python3/dist-packages", "/usr/bin/python3", "usr/lib")
        super().__init__(work, work / "wheel", layout)
        self._version = version
        self._maintainer = maintainer

    def guest(self) -> Path:
        """vchan-guest, with what is compiled of its modules."""
        return self._with_modules(self.guest_tree(), "vchan-guest", lambda name: not is_host(name))

    def host(self) -> Path:
        """vchan-host, with what is compiled of its own."""
        return self._with_modules(self.host_tree(), "vchan-host", is_host)

    def _with_modules(self, tree: "Tree", name: str, wanted: Callable[[str], bool]) -> Path:
        """A package; compiled modules, if there are some, lie beside their sources."""
        built = self._work / "extensions"
        modules = {path.relative_to(built).as_posix(): path for path in built.rglob("*.so")}
        mine = {path: modules[path] for path in sorted(modules) if wanted(path)}
        for path, module in mine.items():
            tree.copy(module, f"{self._layout.library}/{path}")
        if not mine:
            return self._finish(tree, name)
        kind = run("dpkg", "--print-architecture")
        return self._finish(tree, name, kind, f", libc6 (>= {libc_of(mine.values())})")

    def _finish(self, tree: "Tree", name: str, kind: str = "all", needs: str = "") -> Path:
        year = str(datetime.fromtimestamp(source_date(), UTC).year)
        copyright_text = filled((HERE / "copyright").read_text(), {"YEAR": year})
        tree.write(f"usr/share/doc/{name}/copyright", copyright_text.encode())
        tree.write_zipped(f"usr/share/doc/{name}/changelog.gz", self._changelog(name))
        size_kib = tree.size_kib()
        source = HERE / name.removeprefix("vchan-")
        control = (source / "control").read_text()
        values = {"VERSION": self._version, "MAINTAINER": self._maintainer, "SIZE": str(size_kib)}
        values |= {"KIND": kind, "LIBC": needs}
        tree.write("DEBIAN/control", filled(control, values).encode())
        for script in ("postinst", "prerm", "postrm"):
            tree.copy(source / script, f"DEBIAN/{script}", mode=0o755)
        configuration = sorted(path for path in tree.files() if path.startswith("etc/"))
        tree.write("DEBIAN/conffiles", "".join(f"/{path}\n" for path in configuration).encode())
        tree.write_sums()
        target = self._work / f"{name}_{self._version}_{kind}.deb"
        run("dpkg-deb", "--root-owner-group", "-Zxz", "--build", str(tree.root), str(target))
        return target

    def _changelog(self, name: str) -> str:
        date = datetime.fromtimestamp(source_date(), UTC).strftime("%a, %d %b %Y %H:%M:%S +0000")
        return (
            f"{name} ({self._version}) unstable; urgency=medium\n\n"
            f"  * See the project's history.\n\n -- {self._maintainer}  {date}\n"
        )


class Rpm(Packages):
    """Makes the packages with rpmbuild alone.

    Args:
        version: Of both packages; one needs exactly the other.
        maintainer: Who is to be written to about them.
        dist: The distribution's tag, as el9.
        python: The version of its Python that the packages need.
    """

    def __init__(self, work: Path, version: str, maintainer: str, dist: str, python: str) -> None:
        library = f"usr/lib/python{python}/site-packages"
        trees = work / f"rpm-{dist}"
        trees.mkdir()
        super().__init__(
            trees, work / "wheel", Layout(library, f"/usr/bin/python{python}", "usr/lib")
        )
        self._version = version
        self._maintainer = maintainer
        self._dist = dist
        self._python = python

    def build(self) -> list[Path]:
        """Both packages."""
        guest, host = self.guest_tree(), self.host_tree()
        host.directory("var/log/vchan")
        for name, tree in (("vchan-guest", guest), ("vchan-host", host)):
            tree.copy(ROOT / "LICENSE", f"usr/share/licenses/{name}/LICENSE")
            listed = [*self._compiled(tree), *map(self._entry, tree.files()), *owned(tree)]
            (self._work / f"{name}.files").write_text("\n".join(listed) + "\n")
        spec = self._work / "vchan.spec"
        spec.write_text(filled((HERE / "rpm" / "vchan.spec").read_text(), self._values()))
        defines = {
            "_topdir": self._work / "rpmbuild",
            "_build_name_fmt": "%%{NAME}-%%{VERSION}-%%{RELEASE}.%%{ARCH}.rpm",
            "_buildhost": "localhost",
            "source_date_epoch_from_changelog": 0,
            "use_source_date_epoch_as_buildtime": 1,
            "clamp_mtime_to_source_date_epoch": 1,
            "_binary_payload": "w9.gzdio",
        }
        words = [word for name, value in defines.items() for word in ("-D", f"{name} {value}")]
        run("rpmbuild", "-bb", "--quiet", *words, str(spec))
        return sorted((self._work / "rpmbuild" / "RPMS").glob("*.rpm"))

    def _values(self) -> dict[str, str]:
        date = datetime.fromtimestamp(source_date(), UTC)
        return {
            "TREES": str(self._work),
            "VERSION": self._version,
            "DIST": self._dist,
            "PYTHON": self._python,
            "INTERPRETER": self._layout.python,
            "LIBRARY": f"/{self._layout.library}",
            "DEPENDENCIES": self._dependencies(),
            "MAINTAINER": self._maintainer,
            "DATE": date.strftime("%a %b %d %Y"),
        }

    def _dependencies(self) -> str:
        """What the host's side needs besides, as Fedora's Python packages provide it."""
        metadata = next(self._wheel.glob("*.dist-info/METADATA")).read_text()
        needed = re.findall(
            r"^Requires-Dist: ([a-z.-]+?)(?:-python)?>=([0-9.]+); extra == .host.$",
            metadata,
            re.MULTILINE,
        )
        names = [(name.replace(".", "-"), least) for name, least in needed]
        return "\n".join(
            f"Requires: python{self._python}dist({name}) >= {least}"
            for name, least in names
            if name not in RECOMMENDED
        )

    def _compiled(self, tree: "Tree") -> list[str]:
        """Lines for what the package's script compiles: rpm removes it with the package."""
        tag = f"cpython-{self._python.replace('.', '')}"
        lines = []
        for name in tree.files():
            path = Path(name)
            if path.suffix == ".py" and name.startswith(self._layout.library):
                result = f"{path.parent}/__pycache__/{path.stem}.{tag}.pyc"
                tree.write(result, b"")
                lines.append(f"%ghost /{result}")
        return lines

    @staticmethod
    def _entry(name: str) -> str:
        """A file's line in the spec's list; "" for one that has another."""
        if name.endswith(".pyc"):
            return ""
        if name == "etc/vchan/vchan.conf":  # a password may come to stand in it
            return f"%config(noreplace) %attr(0640, root, vchan) /{name}"
        if name.startswith("etc/"):
            return f"%config(noreplace) /{name}"
        kinds = {"usr/share/doc/": "%doc ", "usr/share/licenses/": "%license "}
        kind = next((text for start, text in kinds.items() if name.startswith(start)), "")
        return f"{kind}/{name}"


def owned(tree: "Tree") -> list[str]:
    """Lines for the directories that are the package's own."""
    found = (
        path.relative_to(tree.root).as_posix() for path in tree.root.rglob("*") if path.is_dir()
    )
    lines = [f"%dir /{name}" for name in sorted(found) if "vchan" in name]
    return [line.replace("%dir /var", "%dir %attr(0750, vchan, vchan) /var") for line in lines]


class Tree:
    """Files to be packed, with the permissions they are to have."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(mode=0o755)

    def write(self, name: str, content: bytes, mode: int = 0o644) -> None:
        """Add a file; directories come by themselves."""
        path = self.root / name
        self.directory(str(Path(name).parent))
        path.write_bytes(content)
        path.chmod(mode)

    def directory(self, name: str) -> None:
        """Add a directory, and those above it."""
        for directory in (*reversed(Path(name).parents), Path(name)):
            (self.root / directory).mkdir(mode=0o755, exist_ok=True)

    def copy(self, source: Path, name: str, mode: int = 0o644) -> None:
        """Add a file of the project's."""
        self.write(name, source.read_bytes(), mode)

    def copy_documents(self, package: str, name: str, source: Path) -> None:
        """Add an example."""
        self.copy(source, f"usr/share/doc/{package}/examples/{name}")

    def write_zipped(self, name: str, text: str) -> None:
        """Add a file that is to be read through zcat."""
        self.write(name, gzip.compress(text.encode(), 9, mtime=0))

    def launcher(self, command: str, module: str, python: str) -> None:
        """Add a command."""
        text = LAUNCHER.format(module=module, python=python)
        self.write(f"usr/bin/{command}", text.encode(), 0o755)

    def manual(self, page: str, *, as_page: str = "", **values: str) -> None:
        """Add a manual page."""
        date = datetime.fromtimestamp(source_date(), UTC)
        values["DATE"] = date.strftime("%B %-d, %Y")
        text = filled((HERE / "man" / page).read_text(), values)
        self.write_zipped(f"usr/share/man/man{page[-1]}/{as_page or page}.gz", text)

    def manual_of(self, command: str, module: str) -> None:
        """Add a command's manual page: its own, or what the program says of itself."""
        own = [f"{command}.{section}" for section in "18"]
        page = next((name for name in own if (HERE / "man" / name).exists()), "")
        if command == "vchan":
            self.manual(page, COMMANDS=command_manual(), STATUS=exit_statuses())
            return
        usage = literal(usage_of(module))
        if page:
            self.manual(page, USAGE=usage)
            return
        about = (importlib.import_module(module).__doc__ or "").split("\n")[0]
        assert about.endswith("."), f"{module} begins with no sentence that could name {command}(8)"
        about = literal(about.partition(": ")[2].rstrip("."))
        values = {"COMMAND": command, "TITLE": command.upper(), "ABOUT": about, "USAGE": usage}
        self.manual("command.8", as_page=f"{command}.8", **values)

    def files(self) -> list[str]:
        """What is in it so far, without DEBIAN/."""
        found = (path for path in self.root.rglob("*") if path.is_file())
        names = [path.relative_to(self.root).as_posix() for path in found]
        return sorted(name for name in names if not name.startswith("DEBIAN/"))

    def size_kib(self) -> int:
        """As dpkg counts: each file in whole KiB, each directory as one."""
        files = sum(-(-(self.root / name).stat().st_size // 1024) for name in self.files())
        return files + sum(path.is_dir() for path in self.root.rglob("*"))

    def write_sums(self) -> None:
        """Add dpkg's list of checksums."""
        names = [name for name in self.files() if not name.startswith("etc/")]
        sums = run("md5sum", *names, cwd=self.root)
        self.write("DEBIAN/md5sums", (sums + "\n").encode())


# ---------------------------------------------------------------- documents


def place_in_packages(name: str) -> str:
    """Where one of this project's files is in the packages, below /usr/share/doc; "": in none."""
    for start, place in DOCUMENTED.items():
        if name == start or (start.endswith("/") and name.startswith(start)):
            return place + name[len(start) :]
    return ""


def with_links_of_packages(name: str, text: str) -> str:
    """A page as it is packaged: a link leads to where the packages have that, and what they do not
    have is named without one.

    Args:
        name: The page, in this project.
    """
    here = posixpath.dirname(place_in_packages(name))

    def link(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(name), found["path"]))
        place = place_in_packages(target)
        if not place:
            return found["text"]
        return f"[{found['text']}]({posixpath.relpath(place, here)}{found['part'] or ''})"

    return LINK.sub(link, text)


# ---------------------------------------------------------------- cloud-init


def cloud_init(work: Path, zipapp: Path, package: Path, url: str) -> list[Path]:
    """User-data and vendor-data with what they install filled in."""
    guest = HERE / "guest"
    service = (guest / "vchan-guest.service").read_text()
    values = {
        "ZIPAPP": base64.encodebytes(zipapp.read_bytes()).decode(),
        "SERVICE": service.replace(
            "/usr/bin/vchan-guest", "/usr/bin/python3 -I /opt/vchan/vchan-guest.pyz"
        ),
        "RULES": (guest / "60-vchan-guest.rules").read_text(),
        "SYSUSERS": (guest / "sysusers.conf").read_text(),
        "TMPFILES": (guest / "tmpfiles.conf").read_text(),
        "AGENT": (ROOT / "examples" / "agent.py").read_text(),
        "DEB": package.name,
        "SHA256": hashlib.sha256(package.read_bytes()).hexdigest(),
        "URL": url,
    }
    made = []
    for template in sorted((ROOT / "cloud-init").glob("*.in")):
        target = work / template.stem
        target.write_text(filled_lines(template.read_text(), values))
        made.append(target)
    script = (work / "vendor-data.sh").read_text()
    nova = work / "vendor_data.json"
    nova.write_text(json.dumps({"cloud-init": script}) + "\n")
    return [*made, nova]


# ---------------------------------------------------------------- the manual


def manual_of_documents(work: Path) -> list[Path]:
    """Manual pages that are pages of docs/, as docs/conf.py names them."""
    options = ("--builder", "man", "--fail-on-warning", "-q", "--doctree-dir", str(work / "tree"))
    run(sys.executable, "-m", "sphinx", *options, str(ROOT / "docs"), str(work))
    return sorted(work.glob("*.[1-8]"))


def guest_configuration() -> str:
    """vchan-guest's file, with its defaults."""
    from vchan.agents.allowed import DEFAULT_ALLOW
    from vchan.guest.daemon import DEFAULT_REPORT

    values = {"ALLOW": DEFAULT_ALLOW, "REPORT": DEFAULT_REPORT}
    return filled((HERE / "guest" / "guest.conf").read_text(), values)


def host_configuration() -> str:
    """vchan-host's file, with its defaults."""
    from vchan.host.broker.config import HONOURED
    from vchan.host.config import OPTIONS

    comment = textwrap.TextWrapper(100, initial_indent="# ", subsequent_indent="# ")
    options = (
        f"{comment.fill(option.help)}\n#{option.name} = {written(option)}".rstrip()
        for option in OPTIONS
    )
    values = {"OPTIONS": "\n\n".join(options), "HONOURED": comment.fill(", ".join(HONOURED))}
    return filled((HERE / "host" / "vchan.conf").read_text(), values)


def host_honoured() -> str:
    """The options of oslo.messaging's that are read, for roff."""
    from vchan.host.broker.config import HONOURED

    return "\n".join(f".Ic {name} ," for name in HONOURED).removesuffix(" ,") + " ."


def completion(shell: str) -> str:
    """What makes a shell complete vchan's words."""
    from vchan.cli.completion import script
    from vchan.cli.parser import build_parser

    return script(shell, build_parser())


def exit_statuses() -> str:
    """vchan's, for roff."""
    from vchan.cli.failures import STATUSES

    return literal(STATUSES)


def command_manual() -> str:
    """Every command of vchan's with its arguments, from the parser, for roff."""
    from vchan.cli.completion import commands
    from vchan.cli.parser import build_parser, walk

    parser = build_parser()
    every = commands(parser)
    common = {option.names for option in every[0].options}
    out = [".Ss Options of every command", *manual_list(every[0].options)]
    for command, (path, each) in zip(every[1:], list(walk(parser))[1:], strict=True):
        words = (*path, *(operand.value for operand in command.operands))
        out += [f".Ss {literal(' '.join(words))}", *sentences(each.description or "")]
        own = [option for option in command.options if option.names not in common]
        out += manual_list([*command.operands, *own])
        if each.epilog:
            out += [".Pp", *sentences(" ".join(each.epilog.split()))]
    return "\n".join(out)


def manual_list(arguments: Iterable[Any]) -> list[str]:
    """Arguments with what they are for, for roff."""
    items = []
    for each in arguments:
        names = " , ".join(f"Fl {literal(name[1:])}" for name in each.names)
        value = f"Ar {literal(each.value)}" if each.value else ""
        items += [f".It {' '.join(filter(None, (names, value)))}", *sentences(each.help)]
        if each.words:
            items += [literal(f"One of {', '.join(each.words)}.")]
    return [".Bl -tag -width Ds", *items, ".El"] if items else []


def host_options() -> str:
    """Every option of vchan-host's own, from the list it parses."""
    from vchan.host.config import list_opts

    out = []
    for section, options in list_opts():
        out += [f".Sh SECTION [{section}]", ".Bl -tag -width Ds"]
        for option in options:
            out += [f".It Ic {option.name}", *sentences(option.help)]
            out += [".br", f"Default: {literal(default_of(option))}."]
        out.append(".El")
    return "\n".join(out)


def default_of(option: Any) -> str:
    """An option's default, for people."""
    return written(option) or "none"


def written(option: Any) -> str:
    """An option's default, as one would write it."""
    value = option.default if option.sample_default is None else option.sample_default
    if isinstance(value, list):
        value = ", ".join(value)
    return "" if value is None else str(value)


def sentences(text: str) -> Iterable[str]:
    """One sentence a line, as roff wants it."""
    return (literal(line) for line in re.sub(r"([.:]) (?=[A-Z])", r"\1\n", text).split("\n"))


@functools.cache
def usage_of(module: str) -> str:
    """What a program says of itself."""
    return run(sys.executable, "-m", module, "--help")


def literal(text: str) -> str:
    """Text that roff prints as it is."""
    escaped = text.rstrip().replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"^([.'])", r"\\&\1", escaped, flags=re.MULTILINE)


# ---------------------------------------------------------------- helpers


def is_host(name: str) -> bool:
    """Whether the host's package holds a file of the library; else the guest's does."""
    return HOST_PART.match(name) is not None


def libc_of(modules: Iterable[Path]) -> str:
    """The least version of the C library that has all that compiled modules need of it."""
    found = {
        word for each in modules for word in re.findall(rb"GLIBC_(2\.[0-9]+)", each.read_bytes())
    }
    return max((word.decode() for word in found), key=lambda version: int(version[2:]))


def filled(template: str, values: dict[str, str]) -> str:
    """A template with each @NAME@ replaced; every one must be known."""
    return re.sub(r"@([A-Z0-9]+)@", lambda found: values[found.group(1)], template)


def filled_lines(template: str, values: dict[str, str]) -> str:
    """As `filled`, but a value that stands alone on its line is indented as its name is."""

    def indented(found: re.Match[str]) -> str:
        margin, name = found.groups()
        lines = values[name].rstrip("\n").split("\n")
        return "\n".join((margin + line).rstrip() for line in lines)

    return filled(re.sub(r"^( *)@([A-Z0-9]+)@$", indented, template, flags=re.MULTILINE), values)


def run(*command: str, cwd: Path = ROOT) -> str:
    """Run a program; its output, or an end with all it said."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


if __name__ == "__main__":
    main()
