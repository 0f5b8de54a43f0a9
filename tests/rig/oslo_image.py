"""oslo.messaging in a guest image: this Python's own, with what it imports and nothing else.

The guest's Python and this one are of one version, so that compiled modules fit.
"""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Final

from tests.rig import RigError
from tests.rig.guest_image import RELEASE, SITE

CONFIG: Final = "app/agent.conf"
CONFIG_TEXT: Final = b"""\
[DEFAULT]
transport_url = vchan:///run/vchan/agent.sock
# One at a time, so that the order in which they run can be counted.
executor_thread_pool_size = 1
"""

# Prints the top-level packages that a server and a client import, as {name: file or directory}.
_TRACE: Final = """
import json, pathlib, sys, warnings
warnings.simplefilter("ignore")
sys.modules["eventlet"] = sys.modules["greenlet"] = None  # not in the guest
from oslo_service import backend
backend.init_backend(backend.BackendType.THREADING)
import oslo_messaging
from oslo_config import cfg
cfg.CONF([], default_config_files=[])
transport = oslo_messaging.get_rpc_transport(cfg.CONF, "vchan:///nowhere")
target = oslo_messaging.Target(topic="t", server="s")
oslo_messaging.get_rpc_server(transport, target, [])
oslo_messaging.get_rpc_client(transport, target)
if sys.argv[1:]:
    oslo_messaging.get_rpc_transport(cfg.CONF, "rabbit://nowhere")
    import kombu.transport.pyamqp
found = {}
for module in list(sys.modules.values()):
    parts = pathlib.Path(getattr(module, "__file__", None) or "/").parts
    if "site-packages" in parts:
        at = parts.index("site-packages") + 1
        found[parts[at]] = str(pathlib.Path(*parts[: at + 1]))
print(json.dumps(found))
"""

_LEFT_OUT: Final = {"tests", "locale", "__pycache__", "hacking", "kafka_driver"}
_EDITABLE: Final = ("__editable__", "_distutils_hack", "distutils")


def can_carry() -> str | None:
    """Why not, or None if it can."""
    version = ".".join(map(str, sys.version_info[:2]))
    if version != RELEASE.python:
        return f"the guest's Python is {RELEASE.python}: compiled modules of {version} do not fit"
    return None


def files(*, rabbit: bool = False) -> dict[str, bytes]:
    """What to add to a guest image.

    Args:
        rabbit: With what its driver rabbit:// needs, too.

    Raises:
        RigError: It cannot be imported here; the message says what went wrong.
    """
    words = ["rabbit"] if rabbit else []
    done = subprocess.run(
        [sys.executable, "-c", _TRACE, *words], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RigError(f"oslo.messaging cannot be traced:\n{done.stderr}")
    packages = {
        name: Path(path)
        for name, path in json.loads(done.stdout).items()
        if not name.startswith(_EDITABLE)
    }
    found = {CONFIG: CONFIG_TEXT}
    for name, path in packages.items():
        found |= _package(name, path)
    return found | _metadata(set(packages))


def _package(name: str, path: Path) -> dict[str, bytes]:
    if path.is_file():
        return {f"{SITE}/{name}": path.read_bytes()}
    return {
        f"{SITE}/{name}/{file.relative_to(path).as_posix()}": file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.suffix in (".py", ".so") and not _LEFT_OUT & set(file.relative_to(path).parts)
    }


def _metadata(packages: set[str]) -> dict[str, bytes]:
    """Names, versions and entry points: by these oslo.messaging finds its drivers."""
    modules = {name.removesuffix(".py") for name in packages} | {"vchan"}
    by_module = importlib.metadata.packages_distributions()
    names = {name for module in modules for name in by_module.get(module, ())} | {"vchan"}
    found = {}
    for name in sorted(names):
        distribution = importlib.metadata.distribution(name)
        directory = f"{SITE}/{name.replace('-', '_').replace('.', '_')}.dist-info"
        head = f"Metadata-Version: 2.1\nName: {name}\nVersion: {distribution.version}\n"
        found[f"{directory}/METADATA"] = head.encode()
        points = distribution.read_text("entry_points.txt")
        if points:
            found[f"{directory}/entry_points.txt"] = points.encode()
    return found
