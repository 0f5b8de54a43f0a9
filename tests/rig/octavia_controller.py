"""The controller's side of octavia: its own driver, told what to do on standard input.

    octavia_controller.py CONFIG AMPHORA ADDRESS

A line in is a JSON list, a method of this program's and its arguments; a line out is what it
returned, as JSON. How the driver reaches the amphora, its environment says (HTTPS_PROXY).
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from typing import Any

from octavia.amphorae.drivers.haproxy import rest_api_driver
from octavia.common import data_models, service

BALANCER = "4d0a0f3c-0000-4000-8000-000000000001"


class Controller:
    """What an octavia worker does with an amphora."""

    def __init__(self, amphora: str, address: str) -> None:
        self._driver = rest_api_driver.HaproxyAmphoraLoadBalancerDriver()
        self._amphora = data_models.Amphora(id=amphora, lb_network_ip=address)

    @property
    def _client(self) -> Any:
        return self._driver.clients["1.0"]

    def check(self) -> str:
        """Which version the agent's API has."""
        self._amphora.api_version = None
        self._driver.check(self._amphora)
        return str(self._amphora.api_version)

    def info(self) -> Any:
        """What it says of itself."""
        return self._driver.get_info(self._amphora)

    def upload(self, seed: int, size: int) -> bool:
        """A certificate of this size; whether the agent has it as it was sent."""
        pem = random.Random(seed).randbytes(size // 2).hex()
        name = f"{hashlib.sha1(pem.encode()).hexdigest()}.pem"
        self._client.upload_cert_pem(self._amphora, BALANCER, name, pem)
        has = self._client.get_cert_md5sum(self._amphora, BALANCER, name)
        self._client.delete_cert_pem(self._amphora, BALANCER, name)
        return bool(has == hashlib.md5(pem.encode()).hexdigest())


def main() -> None:
    """Until there is nothing more to do."""
    config, amphora, address = sys.argv[1:]
    answers, sys.stdout = sys.stdout, sys.stderr  # octavia's log goes to the one that it finds
    service.prepare_service(["controller", "--config-file", config])
    controller = Controller(amphora, address)
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            result = getattr(controller, name)(*arguments)
        except Exception as error:  # noqa: BLE001 - the test is told
            result = {"failed": f"{type(error).__name__}: {error}"}
        print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    main()
