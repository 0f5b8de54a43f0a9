"""Compiles modules, those that setup.py names, and puts them anywhere: beside their sources, say.

    python packaging/compiled.py SOURCES TARGET

They are for the kind of this machine, and for the Python that runs this.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLAGS = {
    "CFLAGS": "-g0 -fstack-protector-strong -D_FORTIFY_SOURCE=2"
    " -fno-plt -fvisibility=hidden -flto=1",
    "LDSHARED": "gcc -shared -O2 -flto=1",  # a Python's own may name where its libraries are
    "LDFLAGS": "-s -Wl,-z,relro -Wl,-z,now -Wl,--no-as-needed",
}
"""As Debian builds what it packs; and so that a call, of which there are hundreds for each message,
is one jump: mypyc's own functions directly, Python's without a stub between."""


def build(sources: Path, target: Path) -> None:
    """Compile what lies in `sources`, the directory that has vchan/ in it.

    Nothing but the modules and setup.py is given to setuptools: what pyproject.toml says takes a
    newer one than a Debian has, and setuptools leaves its traces in the tree.
    """
    with tempfile.TemporaryDirectory(prefix="vchan-compiled-") as directory:
        work = Path(directory)
        shutil.copytree(sources / "vchan", work / "vchan", ignore=shutil.ignore_patterns("*.so"))
        shutil.copy(ROOT / "setup.py", work)
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", "made"]
        environment = os.environ | FLAGS | {"VCHAN_COMPILE": "1"}
        done = subprocess.run(
            command, cwd=work, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(
                f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
            )
        shutil.copytree(work / "made", target, dirs_exist_ok=True)


if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(sys.argv[2]))
