"""A Debian tree that has booted on this machine's own kernel: systemd is the first process of
namespaces of their own. Nothing is emulated, so that it takes seconds. There is no udev, no network
but loopback; what is written goes to memory, and the tree stays as it is.

    with BootedTree(directory, tree) as booted:
        booted.check("systemctl is-active vchan-host")
"""

import contextlib
import os
import signal
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tests.rig import RigError, tail, wait_until
from tests.rig.debian_image import SCRIPT_TIMEOUT_S, Scripts
from tests.rig.guest import Finished

ENVIRONMENT: Final = ("env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8")
HERE: Final = """
mount -t cgroup2 cgroup2 cgroups
mkdir "$GROUP"
unshare --mount --pid --net --uts --ipc --fork sh -ec "$JOIN" || true
until rmdir $(find "$GROUP" -depth -type d); do sleep 0.1; done
"""
"""Stays outside, and takes the control group away when all in it have ended."""
JOIN: Final = """
read -r pid rest </proc/self/stat # as those outside know it
echo 0 >"$GROUP/cgroup.procs"
echo "$pid" >pid
exec unshare --cgroup sh -ec "$BOOT"
"""
BOOT: Final = """
mount -t tmpfs written written
mkdir written/files written/work
mount -t overlay overlay -o "lowerdir=$TREE,upperdir=written/files,workdir=written/work" root
cd root
mount -t proc proc proc
mount --bind -o ro proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -o remount,bind,ro sys # udev starts where it can write there
mount -t tmpfs -o mode=755 run run
mount -t tmpfs -o mode=755 dev dev
for name in null zero full random urandom tty; do
    touch "dev/$name"
    mount --bind "/dev/$name" "dev/$name"
done
mkdir dev/shm dev/pts here
mount -t tmpfs shm dev/shm
mount -t devpts -o newinstance,ptmxmode=666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
# Another root, and not chroot's: that would forbid units to have users of their own.
pivot_root . here
umount -l here
rmdir here
exec setpriv --bounding-set=-sys_time,-sys_module,-sys_boot,-sys_rawio \\
    $ENVIRONMENT container=other \\
    /lib/systemd/systemd systemd.log_target=console systemd.show_status=false
"""


class BootedTree(Scripts):
    """One boot; needs root.

    Args:
        directory: Its own, which is made.
    """

    rest = 0.0

    def __init__(self, directory: Path, tree: Path) -> None:
        self._directory = directory
        self._tree = tree
        self._log = directory / "log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        for name in ("cgroups", "written", "root"):
            (self._directory / name).mkdir(parents=True)
        environment = {
            "GROUP": f"cgroups/vchan-{os.urandom(8).hex()}",
            "TREE": str(self._tree),
            "JOIN": JOIN,
            "BOOT": BOOT,
            "ENVIRONMENT": " ".join(ENVIRONMENT),
        }
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["unshare", "--mount", "sh", "-ec", HERE],
                cwd=self._directory,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            self._wait_booted()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end()

    def end(self) -> None:
        """End it at once, with all that runs there."""
        assert self._process is not None
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            os.kill(self._init(), signal.SIGKILL)
        self._process.wait()

    def run(self, script: str, *, timeout_s: float = SCRIPT_TIMEOUT_S) -> Finished:
        enter = ("nsenter", "--target", str(self._init()), "--all", "--root", "--wd")
        try:
            done = subprocess.run(
                [*enter, *ENVIRONMENT, "sh", "-c", f"exec 2>&1; {script}"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise RigError(f"{script!r} does not end:\n{error.output}\n{tail(self._log)}") from None
        return Finished(done.returncode, done.stdout + done.stderr)

    def _init(self) -> int:
        return int((self._directory / "pid").read_text())

    def _wait_booted(self) -> None:
        def is_up() -> bool:
            assert self._process is not None
            if self._process.poll() is not None:
                raise RigError(f"it ended while booting:\n{tail(self._log)}")
            # Before that, what enters finds the namespaces of who made them.
            return self._has_begun() and self.run("test -S /run/systemd/private").status == 0

        wait_until(
            is_up,
            timeout_s=SCRIPT_TIMEOUT_S,
            interval_s=0.1,
            failure=lambda: f"it does not boot:\n{tail(self._log)}",
        )
        self.run("systemctl is-system-running --wait")

    def _has_begun(self) -> bool:
        try:
            return Path(f"/proc/{self._init()}/comm").read_text() == "systemd\n"
        except (OSError, ValueError):  # the file is not there yet, or empty
            return False
