"""Builds what users install: Debian packages, a zipapp, the wheel, cloud-init's data.

    scripts/package [--output DIR] [--deb-version VERSION] [--maintainer WHO] [--url URL]

Everything is made from the wheel, so that no file is in one and forgotten in another. With the same
tree, the same SOURCE_DATE_EPOCH (default: the last commit's date) and the same Python, the same
bytes come out.
"""

import argparse
import base64
import gzip
import hashlib
import importlib
import json
import os
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
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
NO_MAINTAINER = "unnamed maintainer <unnamed@vchan.invalid>"
"""Debian wants somebody to write to. That is who builds the packages and hands them out: if they do
not say, nobody can mistake this for an address (RFC 2606)."""
LIBRARY = "usr/lib/python3/dist-packages"
HOST_PART = re.compile(r"vchan/(host/|conductor/|cli\.py)")
"""What the host's package holds of the library; the guest's holds the rest."""
UNUSED = re.compile(r"vchan/protocol\.py")
"""The wire's definition: what runs is generated from it."""
LAUNCHER = """\
#!/usr/bin/python3 -I
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
    debian = Debian(work, options.deb_version or version, options.maintainer)
    made = [wheel, build_zipapp(work), debian.guest(), debian.host()]
    made += cloud_init(work, made[1], made[2], options.url)
    for artefact in made:
        shutil.copy(artefact, options.output / artefact.name)
        print(options.output / artefact.name)


def build_wheel(work: Path) -> Path:
    """The wheel, from a copy: setuptools leaves its traces in the tree."""
    tree = work / "tree"
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("vchan", "pyproject.toml", "README.md"):
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
        if not HOST_PART.match(name) and not UNUSED.match(name)
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


# ---------------------------------------------------------------- Debian packages


class Debian:
    """Makes the packages from staged trees, with dpkg-deb alone.

    Args:
        version: Of both packages; one needs exactly the other.
        maintainer: Who is to be written to about them.
    """

    def __init__(self, work: Path, version: str, maintainer: str) -> None:
        self._work = work
        self._wheel = work / "wheel"
        self._version = version
        self._maintainer = maintainer

    def guest(self) -> Path:
        """vchan-guest: the daemon in a VM, and the library, which the host's package uses too."""
        tree = Tree(self._work / "vchan-guest")
        for name, content in guest_files(self._wheel / "vchan").items():
            tree.write(f"{LIBRARY}/{name}", content)
        tree.write(f"{LIBRARY}/vchan/py.typed", b"")
        metadata = next(self._wheel.glob("*.dist-info"))
        for name in ("METADATA", "entry_points.txt"):
            tree.copy(metadata / name, f"{LIBRARY}/{metadata.name}/{name}")
        source = HERE / "guest"
        for unit in sorted(source.glob("*.service")):
            tree.copy(unit, f"lib/systemd/system/{unit.name}")
        self._commands(tree, lambda module: module.startswith("vchan.guest."))
        tree.copy(source / "60-vchan-guest.rules", "lib/udev/rules.d/60-vchan-guest.rules")
        tree.copy(source / "sysusers.conf", "usr/lib/sysusers.d/vchan.conf")
        tree.copy(source / "tmpfiles.conf", "usr/lib/tmpfiles.d/vchan.conf")
        tree.write("etc/vchan/guest.conf", guest_configuration().encode())
        tree.directory("etc/vchan/agents.d")
        tree.copy_documents("vchan-guest", "relay-only.conf", source / "relay-only.conf")
        for example in sorted((ROOT / "examples").rglob("*")):
            if example.is_file() and "__pycache__" not in example.parts:
                name = example.relative_to(ROOT / "examples").as_posix()
                tree.copy_documents("vchan-guest", name, example)
        return self._finish(tree, "vchan-guest")

    def host(self) -> Path:
        """vchan-host: the daemon of a compute host, and the operator's command."""
        tree = Tree(self._work / "vchan-host")
        for path in (self._wheel / "vchan").rglob("*.py"):
            name = path.relative_to(self._wheel).as_posix()
            if HOST_PART.match(name):
                tree.copy(path, f"{LIBRARY}/{name}")
        self._commands(tree, lambda module: not module.startswith("vchan.guest."))
        source = HERE / "host"
        for unit in sorted(source.glob("*.service")):
            tree.copy(unit, f"lib/systemd/system/{unit.name}")
        tree.write("etc/vchan/vchan.conf", host_configuration().encode())
        tree.copy(source / "logrotate", "etc/logrotate.d/vchan-host")
        policy = "policy.d/90-default.policy"
        tree.copy(ROOT / "etc" / policy, f"etc/vchan/{policy}")
        tree.directory("etc/vchan/conductor.d")
        tree.directory("etc/vchan/relay")
        tree.copy_documents("vchan-host", "relay.conf", source / "relay.conf")
        for example in sorted((ROOT / "libvirt").iterdir()):
            tree.copy_documents("vchan-host", f"libvirt/{example.name}", example)
        tree.manual("vchan.conf.5", OPTIONS=host_options(), HONOURED=host_honoured())
        return self._finish(tree, "vchan-host")

    def _commands(self, tree: "Tree", wanted: Callable[[str], bool]) -> None:
        """The wheel's commands whose module is wanted, and a manual page for each."""
        found = next(self._wheel.glob("*.dist-info/entry_points.txt")).read_text()
        scripts = found.partition("[console_scripts]")[2].partition("[")[0]
        for name, module in re.findall(r"^(\S+) = (\S+):main$", scripts, re.MULTILINE):
            if wanted(module):
                tree.launcher(name, module)
                tree.manual_of(name, module)

    def _finish(self, tree: "Tree", name: str) -> Path:
        completion = "usr/share/bash-completion/completions"
        for command in sorted(path.name for path in (tree.root / "usr/bin").iterdir()):
            words = "vchan" if command == "vchan" else "daemons"
            tree.copy(HERE / "completion" / words, f"{completion}/{command}")
        year = str(datetime.fromtimestamp(source_date(), UTC).year)
        copyright_text = filled((HERE / "copyright").read_text(), {"YEAR": year})
        tree.write(f"usr/share/doc/{name}/copyright", copyright_text.encode())
        tree.write_zipped(f"usr/share/doc/{name}/changelog.gz", self._changelog(name))
        size_kib = tree.size_kib()
        source = HERE / name.removeprefix("vchan-")
        control = (source / "control").read_text()
        values = {"VERSION": self._version, "MAINTAINER": self._maintainer, "SIZE": str(size_kib)}
        tree.write("DEBIAN/control", filled(control, values).encode())
        for script in ("postinst", "prerm", "postrm"):
            tree.copy(source / script, f"DEBIAN/{script}", mode=0o755)
        configuration = sorted(path for path in tree.files() if path.startswith("etc/"))
        tree.write("DEBIAN/conffiles", "".join(f"/{path}\n" for path in configuration).encode())
        tree.write_sums()
        target = self._work / f"{name}_{self._version}_all.deb"
        run("dpkg-deb", "--root-owner-group", "-Zxz", "--build", str(tree.root), str(target))
        return target

    def _changelog(self, name: str) -> str:
        date = datetime.fromtimestamp(source_date(), UTC).strftime("%a, %d %b %Y %H:%M:%S +0000")
        return (
            f"{name} ({self._version}) unstable; urgency=medium\n\n"
            f"  * See the project's history.\n\n -- {self._maintainer}  {date}\n"
        )


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

    def launcher(self, command: str, module: str) -> None:
        """Add a command."""
        self.write(f"usr/bin/{command}", LAUNCHER.format(module=module).encode(), 0o755)

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
        usage = literal(run(sys.executable, "-m", module, "--help"))
        if page:
            self.manual(page, USAGE=usage)
            return
        about = (importlib.import_module(module).__doc__ or "").split("\n")[0]
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


def guest_configuration() -> str:
    """vchan-guest's file, with its defaults."""
    from vchan.guest.allowed import DEFAULT_ALLOW

    return filled((HERE / "guest" / "guest.conf").read_text(), {"ALLOW": DEFAULT_ALLOW})


def host_configuration() -> str:
    """vchan-host's file, with its defaults."""
    from vchan.host.broker_config import HONOURED
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
    from vchan.host.broker_config import HONOURED

    return "\n".join(f".Ic {name} ," for name in HONOURED).removesuffix(" ,") + " ."


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


def literal(text: str) -> str:
    """Text that roff prints as it is."""
    escaped = text.rstrip().replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"^([.'])", r"\\&\1", escaped, flags=re.MULTILINE)


# ---------------------------------------------------------------- helpers


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
