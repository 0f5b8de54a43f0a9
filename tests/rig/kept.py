"""What is made once and kept between runs: in $VCHAN_CACHE, or ~/.cache/vchan.

Each thing that is kept has a lock of its own: who makes one, which may take minutes, is waited for
by those alone who want the same.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

UNUSED_KEPT_S: Final = 7 * 24 * 3600.0


def cache_directory() -> Path:
    """Where it is kept."""
    configured = os.environ.get("VCHAN_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "vchan"


@contextlib.contextmanager
def locked(name: str) -> Iterator[Path]:
    """One at a time, among all processes of this machine, at what has this name; gives its path."""
    locks = cache_directory() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with (locks / name).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield cache_directory() / name


@contextlib.contextmanager
def made_once(name: str) -> Iterator[tuple[Path, Path | None]]:
    """The directory of this name; and where it is not there, one to fill that becomes it."""
    with locked(name) as target:
        if target.exists():
            os.utime(target)
            yield target, None
            return
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="making-") as holder:
            part = Path(holder) / "part"
            part.mkdir()
            yield target, part
            part.rename(target)


def drop_unused(pattern: str) -> None:
    """Directories that nobody has wanted for a week."""
    for found in cache_directory().glob(pattern):
        with contextlib.suppress(FileNotFoundError):  # another was faster
            if time.time() - found.stat().st_mtime > UNUSED_KEPT_S:
                shutil.rmtree(found)
