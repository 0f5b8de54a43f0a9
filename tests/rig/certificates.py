"""Private certificate authorities, and what they sign."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.rig import RigError


@dataclass(frozen=True, slots=True)
class Certificate:
    """Files: who signed it, the certificate, its key."""

    ca: Path
    certificate: Path
    key: Path

    def copied(self, directory: Path) -> "Certificate":
        """Another's own copies, which it may read."""
        return Certificate(
            *(Path(shutil.copy(path, directory)) for path in (self.ca, self.certificate, self.key))
        )


class Authority:
    """A certificate authority of a test's own.

    Args:
        directory: Where it keeps its files.
    """

    def __init__(self, directory: Path, name: str = "authority") -> None:
        self._directory = directory
        self._name = name
        self.certificate = directory / f"{name}.pem"
        self._key = directory / f"{name}.key"
        self._openssl(
            *("req", "-x509", *_NEW_KEY, "-days", "2", "-subj", f"/CN={name}"),
            *("-addext", "keyUsage=critical,keyCertSign"),
            *("-keyout", str(self._key), "-out", str(self.certificate)),
        )

    def issue(self, name: str, *, names: str = "") -> Certificate:
        """A certificate for a name; `names` are further ones, e.g. "DNS:localhost"."""
        stem = self._directory / f"{self._name}-{name}"
        request, certificate, key = (stem.with_suffix(f".{end}") for end in ("csr", "pem", "key"))
        self._openssl(
            *("req", *_NEW_KEY, "-subj", f"/CN={name}"),
            *("-keyout", str(key), "-out", str(request)),
        )
        extensions = stem.with_suffix(".ext")
        extensions.write_text(
            f"subjectAltName={names or f'DNS:{name}'}\n"
            # Strict clients take none without it.
            "authorityKeyIdentifier=keyid\n"
        )
        self._openssl(
            *("x509", "-req", "-in", str(request), "-days", "2", "-extfile", str(extensions)),
            *("-CA", str(self.certificate), "-CAkey", str(self._key), "-CAcreateserial"),
            *("-out", str(certificate)),
        )
        return Certificate(self.certificate, certificate, key)

    def _openssl(self, *arguments: str) -> None:
        done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RigError(f"openssl {' '.join(arguments)}: {done.stderr}")


_NEW_KEY = ("-newkey", "rsa:2048", "-nodes")
