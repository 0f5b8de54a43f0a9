"""In place of kolla-ansible's part that talks to docker: notes the container that is wanted.

Each action is a line of JSON in the file that $WANTED names: [ACTION, PARAMETERS].
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


class ContainerWorker:
    """As module kolla_container uses it."""

    def __init__(self, module: Any) -> None:
        self.params = module.params
        self.changed = False
        self.result: dict[str, Any] = {}
        self._file = Path(os.environ["WANTED"])

    def compare_container(self) -> bool:
        """Whether there is another than this; that its files are others, docker alone would see."""
        self.changed = self._wanted("recreate_or_restart_container") != self._now()
        return self.changed

    def __getattr__(self, action: str) -> Callable[[], None]:
        return lambda: self._note(action)

    def _note(self, action: str) -> None:
        self.changed = True
        with self._file.open("a") as file:
            file.write(json.dumps([action, self.params]) + "\n")

    def _wanted(self, action: str) -> Any:
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        found = [params for noted, params in map(json.loads, lines) if noted == action]
        return self._compared(found[-1]) if found else None

    def _now(self) -> Any:
        return self._compared(self.params)

    @staticmethod
    def _compared(params: Any) -> Any:
        """What both actions are told."""
        names = ("name", "image", "volumes", "environment", "dimensions")
        return {name: params.get(name) for name in names}


DockerWorker = ContainerWorker
