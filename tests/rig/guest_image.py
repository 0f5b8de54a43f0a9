"""A small Linux guest with Python and vchan in it: a kernel and an initramfs, cached.

An image is two cpio archives, one after the other, which the kernel unpacks both:

    Debian's part   busybox, CPython and its libraries: fetched once, never changes
    our part        init, kernel modules, vchan/, extra files: written anew when any of it changes

Nothing is installed and no root is needed: packages are downloaded by apt-get and unpacked.

The guest's init takes a list of services on the kernel's command line, starts them, and starts
those that are to be kept again when they die. It links every virtio port under /dev/virtio-ports
when its name becomes known, hot-plugged ones too, and serves a shell on the port SHELL_PORT
(`tests.rig.guest.GuestShell` is the other end).
"""

import base64
import hashlib
import lzma
import os
import re
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.rig import RigError, release
from tests.rig.kept import UNUSED_KEPT_S, cache_directory, locked, made_once

VCHAN_PORT = "org.openstack.vchan.0"
SHELL_PORT = "org.vchan.test.0"
RELEASE = release.of_this_machine()
PYTHON = f"/usr/bin/python{RELEASE.python}"  # python3 in its PATH, too
TAG = f"cpython-{RELEASE.python.replace('.', '')}"
SITE = "site"  # on the guest's PYTHONPATH
PORT_ECHO = "/bin/port-echo"  # with peers=True: the C echo

KERNEL_OPTIONS = "console=ttyS0 quiet no_timer_check mitigations=off"
"""Of every guest's. A kernel that tries its timer on a busy machine without KVM may find none, and
panics at once."""
COMMAND_LINE_BYTES_MAX = 2047  # the kernel's COMMAND_LINE_SIZE on x86, less its final zero
IMAGES_KEPT = 6

KERNEL_PACKAGE = "linux-image-cloud-amd64"
# In the order in which they must be loaded; the last makes ports appear. A kernel may have them
# built in.
MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_console",
)
# Likewise; in images with a network only. Nobody loads them but NETWORK_UP.
NETWORK_MODULES = ("failover", "net_failover", "virtio_net")
# What a guest's shell runs to be on QEMU's user network, whose gateway is this machine's loopback.
NETWORK_GATEWAY = "10.0.2.2"
NETWORK_UP = f"""set -e
for module in {" ".join(NETWORK_MODULES)}; do insmod /modules/$module.ko; done
ip link set lo up
ip link set eth0 up
ip addr add 10.0.2.15/24 dev eth0
"""
# In images with a disk only. Nobody loads it but DISK_UP; ext4 is in the kernel.
DISK_MODULES = ("loop",)
DISK = "/disk"
# What a guest's shell runs to have a file system on a device, which can be frozen, at DISK.
DISK_UP = f"""set -e
for module in {" ".join(DISK_MODULES)}; do insmod /modules/$module.ko; done
truncate -s 8M /tmp/disk.image
mke2fs -F /tmp/disk.image
mkdir -p {DISK}
device=$(losetup -f)
losetup $device /tmp/disk.image
mount -t ext4 $device {DISK}
"""
PYTHON_PACKAGES = (
    "busybox-static",
    "libbz2-1.0",
    "libc6",
    "libcrypt1",
    "libexpat1",
    "libffi8",
    "libgcc-s1",
    "liblzma5",
    f"libpython{RELEASE.python}-minimal",
    f"libpython{RELEASE.python}-stdlib",
    "libstdc++6",
    "libuuid1",
    f"python{RELEASE.python}-minimal",
    "zlib1g",
    *RELEASE.libraries,
)
# qemu-guest-agent with its libraries, to be measured beside vchan.
PEER_PACKAGES = (
    *RELEASE.peer_libraries,
    "libnuma1",
    "libpcre2-8-0",
    "libudev1",
    "liburing2",
    "qemu-guest-agent",
)
# dropbear, Debian's smaller SSH server, and its client, with the libraries that Python needs not.
SSH_PACKAGES = ("dropbear-bin", "libgmp10", "libtomcrypt1", "libtommath1")
UNUSED_FILES = re.compile(
    r"^usr/(share|games|include)/|^(etc|var)/|/(gconv|perl|__pycache__)/"
    r"|/python3\.[0-9]+/(idlelib|lib2to3|test|tkinter|turtledemo|pydoc_data|ensurepip|config-[^/]*)/"
)

INIT = f"""#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox --install -s /bin
mkdir -p /dev/virtio-ports /dev/shm /dev/pts
mount -t devpts -o ptmxmode=0666 pts /dev/pts
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
export PATH=/bin:/usr/sbin HOME=/tmp PYTHONPATH=/{SITE} PYTHONDONTWRITEBYTECODE=1
# Reading from this with a time limit sleeps without the price of a process.
mkfifo /run/never
exec 9<>/run/never

load() {{ [ ! -e /modules/$1.ko ] || insmod /modules/$1.ko; }}
for module in {" ".join(MODULES[:-1])}; do load $module; done
# A port's name becomes known after the port itself; the kernel tells that as an event, so whoever
# makes the links must listen before the first port can appear.
uevent /sbin/link-ports &
until grep -q '^[0-9a-f]* *15 [^ ]* *[0-9a-f]*[1-9a-f]' /proc/net/netlink; do
    read -r -t 0.01 nothing <&9
done
load {MODULES[-1]}
# Where that is built in, the ports were there before.
SUBSYSTEM=virtio-ports link-ports

# supervise NAME keep|once COMMAND: /run/NAME.pid has its process id; while the file /run/NAME.hold
# exists it is not started again.
supervise() {{
    while :; do
        while [ -e /run/$1.hold ]; do read -r -t 0.1 nothing <&9; done
        sh -c "exec $3" </dev/null >/dev/console 2>&1 9>&- &
        echo $! >/run/$1.pid
        wait $!
        echo "init: $1 ended with status $?" >/dev/console
        [ $2 = keep ] || return
        read -r -t 0.05 nothing <&9
    done
}}

# The kernel hands what it does not know on its command line to init's environment.
echo "$vchan_init" | base64 -d >/etc/vchan-init
while read -r name mode command; do
    supervise $name $mode "$command" &
done </etc/vchan-init
echo "init: ready" >/dev/console
while :; do wait; read -r -t 1 nothing <&9; done
"""

LINK_PORTS = f"""#!/bin/busybox sh
[ "$SUBSYSTEM" = virtio-ports ] || exit 0
cd /dev/virtio-ports || exit
for link in *; do [ -e "$link" ] || rm -f "$link"; done
for port in /sys/class/virtio-ports/vport*; do
    name=
    read -r name 2>/dev/null <$port/name
    if [ -z "$name" ] || [ -e "$name" ]; then continue; fi
    ln -s ../${{port##*/}} "$name"
    if [ "$name" = {SHELL_PORT} ]; then setsid serve-shell </dev/null >/dev/console 2>&1 & fi
done
"""

# A line in is an id and a script in base64; a line out is the id, the status and the output in
# base64. A file takes the output, so that what a script leaves in the background holds up nothing.
SERVE_SHELL = f"""#!/bin/busybox sh
exec 3<>/dev/virtio-ports/{SHELL_PORT} || exit
cd /tmp
while :; do
    if ! read -r id script <&3; then
        [ -e /dev/virtio-ports/{SHELL_PORT} ] || exit
        read -r -t 0.1 nothing <&9  # no host there: reads return at once
        continue
    fi
    echo "$script" | base64 -d >/run/shell.script
    sh /run/shell.script </dev/null >/run/shell.output 2>&1 3>&- 9>&-
    echo "$id $? $(base64 -w 0 /run/shell.output)" >&3
done
"""

PORT_ECHO_SOURCE = r"""
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* The least a guest program can do: every byte that comes goes back.
   argv[1]: the port, or fd: and the number of a descriptor that it inherits. */
int main(int argc, char **argv)
{
    static char buffer[32768];
    struct pollfd hung_up = {.events = 0};
    int port;

    if (argc != 2)
        return 1;
    port = strncmp(argv[1], "fd:", 3) ? open(argv[1], O_RDWR) : atoi(argv[1] + 3);
    if (port < 0)
        return 1;
    hung_up.fd = port;
    for (;;) {
        ssize_t got = read(port, buffer, sizeof buffer);
        if (got < 0 && errno != EINTR)
            return 2;
        if (got == 0 && poll(&hung_up, 1, 0) >= 0)
            usleep(1000); /* no host there: reads return at once */
        for (ssize_t sent = 0; sent < got;) {
            ssize_t now = write(port, buffer + sent, got - sent);
            if (now < 0 && errno != EINTR)
                return 3;
            sent += now > 0 ? now : 0;
        }
    }
}
"""

# Run by the guest's own CPython: reads lines "source<TAB>pyc<TAB>path in the guest".
# unchecked-hash, because a cpio has no useful dates: pycs that look stale cost seconds per boot.
COMPILE = """
import py_compile, sys
for line in sys.stdin:
    source, compiled, shown = line.rstrip("\\n").split("\\t")
    py_compile.compile(source, compiled, shown, doraise=True,
                       invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
"""


@dataclass(frozen=True, slots=True)
class Service:
    """A command for the guest's init. `keep`: start it again when it ends."""

    name: str
    command: str
    keep: bool = True

    def line(self) -> str:
        """Its line in the guest's /etc/vchan-init."""
        if not re.fullmatch(r"[\w.-]+", self.name) or "\n" in self.command:
            raise ValueError(f"not a service that init could read: {self!r}")
        return f"{self.name} {'keep' if self.keep else 'once'} {self.command}\n"


@dataclass(frozen=True, slots=True)
class GuestImage:
    """What QEMU boots. Equal images boot equal guests: a snapshot needs the image it came from."""

    kernel: Path
    initrd: Path

    def staged(self, directory: Path) -> "GuestImage":
        """The same image, in a directory that a QEMU of another user can read."""
        directory.mkdir(exist_ok=True)
        directory.chmod(0o755)
        staged = GuestImage(
            kernel=directory / f"{self.initrd.stem}.kernel", initrd=directory / self.initrd.name
        )
        for source, target in ((self.kernel, staged.kernel), (self.initrd, staged.initrd)):
            if not target.exists():
                _link_or_copy(source, target)
        return staged


def command_line(services: Sequence[Service]) -> str:
    """The kernel's command line that makes init run these services."""
    lines = "".join(service.line() for service in services)
    encoded = base64.b64encode(lines.encode()).decode()
    # TCG damages a guest's memory in one migration of hundreds: a kernel that panics starts again.
    line = f"{KERNEL_OPTIONS} panic=1 oops=panic vchan_init={encoded}"
    if len(line) > COMMAND_LINE_BYTES_MAX:
        raise ValueError(f"services take {len(line)} of {COMMAND_LINE_BYTES_MAX} bytes")
    return line


def build(
    extra: Mapping[str, bytes | Path] | None = None,
    *,
    peers: bool = False,
    ssh: bool = False,
    network: bool = False,
    disk: bool = False,
) -> GuestImage:
    """The image with this tree's vchan/ in it: made now (0.1 s; 10 s the first time) or cached.

    Args:
        extra: Path in the guest (no leading slash) to its content: bytes, a file, or a directory.
            All can be executed there. Python files under SITE are compiled.
        peers: Add qemu-guest-agent and the C echo, PORT_ECHO (needs gcc).
        ssh: Add dropbear and its client.
        network: Add what NETWORK_UP loads.
        disk: Add what DISK_UP loads.

    Raises:
        RigError: Something could not be fetched or compiled; the message has the command's output.
    """
    debian = _debian_part()
    files = _vchan_files() | _expanded(extra or {})
    archives = [debian / "base.cpio"]
    if peers:
        archives.append(_added_part("peers", PEER_PACKAGES) / "added.cpio")
        files[PORT_ECHO.lstrip("/")] = port_echo().read_bytes()
    if ssh:
        archives.append(_added_part("ssh", SSH_PACKAGES) / "added.cpio")
    for name in (*(NETWORK_MODULES if network else ()), *(DISK_MODULES if disk else ())):
        files[f"modules/{name}.ko"] = (debian / "modules" / f"{name}.ko").read_bytes()
    key = _digest(*(str(path) for path in archives), INIT, LINK_PORTS, SERVE_SHELL, *_flat(files))
    with locked("images") as images:
        image = GuestImage(kernel=debian / "vmlinuz", initrd=images / f"{key}.cpio")
        if not image.initrd.exists():
            files |= _compiled(images.parent, debian / "root", files)
            _write_initrd(image.initrd, archives, _our_part(debian, files))
        os.utime(image.initrd)
        _prune(images.parent)
    return image


# --- Debian's part


def _debian_part() -> Path:
    """The directory with root/ (the unpacked packages), modules/, vmlinuz and base.cpio."""
    key = _digest(
        *(KERNEL_PACKAGE, *PYTHON_PACKAGES, *MODULES, *NETWORK_MODULES, *DISK_MODULES),
        *(UNUSED_FILES.pattern, COMPILE),
    )
    with made_once(f"debian-{key}") as (made, part):
        if part is not None:
            _unpack([_kernel_release()], part / "kernel")
            _take_kernel(part)
            root = part / "root"
            _unpack(PYTHON_PACKAGES, root)
            _merge_usr(root)
            _drop_unused(root)
            _compile_library(root)
            archive = Cpio()
            archive.tree(root)
            (part / "base.cpio").write_bytes(archive.finished())
    return made


def peers_root() -> Path:
    """The directory that holds qemu-guest-agent, unpacked, with its libraries but libc."""
    return _added_part("peers", PEER_PACKAGES) / "root"


def ssh_root() -> Path:
    """Likewise, of dropbear and its client."""
    return _added_part("ssh", SSH_PACKAGES) / "root"


def _added_part(name: str, packages: Sequence[str]) -> Path:
    """The directory with root/, these packages unpacked, and the archive of it."""
    key = _digest(*packages, UNUSED_FILES.pattern, "added.cpio")
    with made_once(f"{name}-{key}") as (made, part):
        if part is not None:
            root = part / "root"
            _unpack(packages, root)
            _merge_usr(root)
            _drop_unused(root)
            archive = Cpio()
            archive.tree(root)
            (part / "added.cpio").write_bytes(archive.finished())
    return made


def _kernel_release() -> str:
    """The package that holds the kernel which the metapackage stands for."""
    dependencies = _run(["apt-cache", "depends", "--important", KERNEL_PACKAGE])
    found = re.search(r"Depends: (linux-image-\S+)", dependencies)
    if found is None:
        raise RigError(f"{KERNEL_PACKAGE} names no kernel (no package lists?):\n{dependencies}")
    return found.group(1)


def _unpack(packages: Sequence[str], root: Path) -> None:
    with tempfile.TemporaryDirectory() as holder:
        _run(["apt-get", "download", "-qq", *packages], cwd=Path(holder))
        for package in sorted(Path(holder).glob("*.deb")):
            _run(["dpkg-deb", "-x", str(package), str(root)])


def _take_kernel(part: Path) -> None:
    """Keep of the kernel's package the kernel and our modules."""
    source = part / "kernel"
    (part / "modules").mkdir()
    wanted = MODULES + NETWORK_MODULES + DISK_MODULES
    found = {path.name.partition(".")[0]: path for path in source.rglob("*.ko*")}
    listed = next(source.rglob("modules.builtin")).read_text().splitlines()
    built_in = {Path(line).stem for line in listed}
    for module in wanted:
        if module in built_in:
            continue
        packed = found[module].read_bytes()
        content = lzma.decompress(packed) if found[module].suffix == ".xz" else packed
        (part / "modules" / f"{module}.ko").write_bytes(content)
    next((source / "boot").glob("vmlinuz-*")).rename(part / "vmlinuz")
    (part / "vmlinuz").chmod(0o644)
    shutil.rmtree(source)


def _merge_usr(root: Path) -> None:
    """Packages of Debian 12 may hold /bin and /lib as directories: make them links into /usr."""
    for name in ("bin", "sbin", "lib", "lib64"):
        merged = root / "usr" / name
        merged.mkdir(parents=True, exist_ok=True)
        if (root / name).is_dir():
            shutil.copytree(root / name, merged, symlinks=True, dirs_exist_ok=True)
            shutil.rmtree(root / name)
        (root / name).symlink_to(f"usr/{name}")


def _drop_unused(root: Path) -> None:
    for path in root.rglob("*"):
        inside = path.relative_to(root).as_posix()
        if UNUSED_FILES.search(inside) and (path.is_symlink() or path.is_file()):
            path.unlink()


def _compile_library(root: Path) -> None:
    library = root / f"usr/lib/python{RELEASE.python}"
    lines = []
    for source in sorted(library.rglob("*.py")):
        compiled = source.parent / "__pycache__" / f"{source.stem}.{TAG}.pyc"
        lines.append(f"{source}\t{compiled}\t/{source.relative_to(root)}\n")
    _guest_python(root, COMPILE, lines)


def _guest_python(root: Path, program: str, lines: Sequence[str]) -> None:
    """Run a program under the guest's CPython on this machine, by the guest's own loader."""
    libraries = root / "usr/lib/x86_64-linux-gnu"
    _run(
        [
            *(str(libraries / "ld-linux-x86-64.so.2"), "--library-path", str(libraries)),
            *(str(root / PYTHON.lstrip("/")), "-S", "-c", program),
        ],
        given="".join(lines),
        environment={"PYTHONHOME": str(root / "usr"), "LANG": "C.UTF-8"},
    )


# --- our part


def _vchan_files() -> dict[str, bytes]:
    """vchan as a guest needs it: all but the host's half, so that editing that rebuilds nothing."""
    package = Path(__file__).parents[2] / "vchan"
    return {
        f"{SITE}/vchan/{path.relative_to(package).as_posix()}": path.read_bytes()
        for pattern in ("*.py", f"*.{TAG}-*.so")  # what is compiled for its Python, too
        for path in sorted(package.rglob(pattern))
        if path.relative_to(package).parts[0] != "host"
    }


def _expanded(extra: Mapping[str, bytes | Path]) -> dict[str, bytes]:
    files = {}
    for name, content in extra.items():
        if isinstance(content, bytes):
            files[name] = content
        elif content.is_file():
            files[name] = content.read_bytes()
        else:
            files |= {
                f"{name}/{path.relative_to(content).as_posix()}": path.read_bytes()
                for path in sorted(content.rglob("*"))
                if path.is_file() and "__pycache__" not in path.parts
            }
    return files


def _compiled(cache: Path, root: Path, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The pycs of all Python files under SITE; each is compiled once in the cache's life."""
    pool = cache / "pyc"
    pool.mkdir(exist_ok=True)
    sources = {name: body for name, body in files.items() if re.match(rf"{SITE}/.*\.py$", name)}
    pooled = {name: pool / f"{_digest(name, body)}.pyc" for name, body in sources.items()}
    with tempfile.TemporaryDirectory() as holder:
        lines = []
        for number, (name, compiled) in enumerate(pooled.items()):
            if not compiled.exists():
                source = Path(holder) / f"{number}.py"
                source.write_bytes(sources[name])
                lines.append(f"{source}\t{compiled}\t/{name}\n")
        if lines:
            _guest_python(root, COMPILE, lines)
    beside = {name: Path(name) for name in sources}
    return {
        f"{path.parent}/__pycache__/{path.stem}.{TAG}.pyc": pooled[name].read_bytes()
        for name, path in beside.items()
    }


def _our_part(debian: Path, files: Mapping[str, bytes]) -> bytes:
    archive = Cpio()
    for name in ("dev", "etc", "proc", "run", "sys", "tmp"):
        archive.directory(name)
    archive.link("var/run", "../run")
    # devtmpfs brings these later; the kernel wants a console for init before that.
    archive.device("dev/console", major=5, minor=1)
    archive.device("dev/null", major=1, minor=3)
    for module in MODULES:
        path = debian / "modules" / f"{module}.ko"
        if path.exists():
            archive.file(f"modules/{module}.ko", path.read_bytes())
    archive.link("usr/bin/python3", PYTHON)
    archive.file("init", INIT.encode())
    # Not /sbin: that is a link in Debian's part.
    archive.file("usr/sbin/link-ports", LINK_PORTS.encode())
    archive.file("usr/sbin/serve-shell", SERVE_SHELL.encode())
    for name, content in files.items():
        archive.file(re.sub(r"^(bin|sbin|lib|lib64)/", r"usr/\1/", name), content)
    return archive.finished()


def port_echo() -> Path:
    """The C echo, a static program."""
    program = cache_directory() / f"port-echo-{_digest(PORT_ECHO_SOURCE)}"
    if not program.exists():
        options = ["-static", "-O2", "-Wall", "-Werror", "-xc", "-"]
        _run(["gcc", *options, "-o", f"{program}.new"], given=PORT_ECHO_SOURCE)
        Path(f"{program}.new").rename(program)
    return program


def _write_initrd(target: Path, archives: Sequence[Path], ours: bytes) -> None:
    target.parent.mkdir(exist_ok=True)
    unfinished = target.with_suffix(".new")
    with unfinished.open("wb") as output:
        for archive in archives:
            with archive.open("rb") as part:
                shutil.copyfileobj(part, output, 1 << 20)
        output.write(ours)
    unfinished.rename(target)


def _prune(cache: Path) -> None:
    """Drop old images and compiled files. A guest that runs has its image open or unpacked."""
    images = sorted((cache / "images").iterdir(), key=lambda path: -path.stat().st_mtime)
    for image in images[IMAGES_KEPT:]:
        image.unlink()
    oldest_s = time.time() - UNUSED_KEPT_S
    for compiled in (cache / "pyc").iterdir():
        if compiled.stat().st_mtime < oldest_s:
            compiled.unlink()


# --- small parts


class Cpio:
    """A "newc" cpio archive: all files belong to root and all can be executed; no dates."""

    def __init__(self) -> None:
        self._archive = bytearray()
        self._names: set[str] = set()

    def directory(self, name: str) -> None:
        """Add a directory and those above it, unless they are there already."""
        if name not in ("", ".") and name not in self._names:
            self.directory(Path(name).parent.as_posix())
            self._add(name, stat.S_IFDIR | 0o755)

    def file(self, name: str, content: bytes) -> None:
        """Add a file and the directories above it."""
        self.directory(Path(name).parent.as_posix())
        self._add(name, stat.S_IFREG | 0o755, content)

    def link(self, name: str, target: str) -> None:
        """Add a symbolic link and the directories above it."""
        self.directory(Path(name).parent.as_posix())
        self._add(name, stat.S_IFLNK | 0o777, target.encode())

    def device(self, name: str, *, major: int, minor: int) -> None:
        """Add a character device."""
        self._add(name, stat.S_IFCHR | 0o600, device=(major, minor))

    def tree(self, root: Path) -> None:
        """Add everything under a directory."""
        for path in sorted(root.rglob("*")):
            name = path.relative_to(root).as_posix()
            if path.is_symlink():
                self.link(name, str(path.readlink()))
            elif path.is_file():
                self.file(name, path.read_bytes())

    def finished(self) -> bytes:
        """The archive; nothing may be added after."""
        self._add("TRAILER!!!", 0)
        return bytes(self._archive)

    def _add(
        self, name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)
    ) -> None:
        self._names.add(name)
        encoded = name.encode() + b"\0"
        fields = (
            *(len(self._names), mode, 0, 0, 1, 0, len(content)),  # inode, mode, owner, links, date
            *(0, 0, *device, len(encoded), 0),
        )
        for part in (b"070701" + b"".join(b"%08x" % field for field in fields) + encoded, content):
            self._archive += part
            self._archive += bytes(-len(self._archive) % 4)


def _run(
    command: Sequence[str],
    *,
    cwd: Path | None = None,
    given: str = "",
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run a command to its end and return what it said.

    Raises:
        RigError: It is missing or failed; the message carries its output.
    """
    try:
        done = subprocess.run(
            list(command),
            cwd=cwd,
            env=environment,
            input=given,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError as error:
        raise RigError(f"{command[0]} is not installed: run scripts/install-deps") from error
    if done.returncode != 0:
        raise RigError(f"{' '.join(command[:4])} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def _flat(files: Mapping[str, bytes]) -> Iterator[str | bytes]:
    for name in sorted(files):
        yield name
        yield files[name]


def _digest(*parts: str | bytes) -> str:
    """A short name for contents; each part's length counts, so that parts cannot run together."""
    digest = hashlib.blake2b(digest_size=10)
    for part in parts:
        encoded = part.encode() if isinstance(part, str) else part
        digest.update(b"%d:" % len(encoded))
        digest.update(encoded)
    return digest.hexdigest()


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:  # another file system
        shutil.copyfile(source, target)
    target.chmod(0o644)
