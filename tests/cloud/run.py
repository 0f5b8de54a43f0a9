"""A run: servers are made, and everything is done to them under load; each operation has a row."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Final

from tests.cloud.journal import Journal
from tests.cloud.load import Load
from tests.cloud.openstack import TENANTS, Nova
from tests.cloud.operations import ALL, SHORT, WITHOUT, Operation, power_on_all
from tests.cloud.stage import Cloud, Say
from tests.cloud.verdict import Row, Sent, Times, judge
from tests.rig import RigError

BACK_TIMEOUT_S: Final = 180.0
"""A server that does not answer by then, on its own, needs a hand."""
BEFORE_S: Final = 2.0
AFTER_S: Final = 2.0
"""How long the load runs on its own before and after an operation."""
DRAIN_S: Final = 60.0
"""For casts that were sent to be run."""


class Run:
    """One run on one cloud."""

    def __init__(self, cloud: Cloud, say: Say, *, short: bool, only: Sequence[str] = ()) -> None:
        self._cloud = cloud
        self._say = say
        self._operations = _named(SHORT if short else ALL, only)
        self._without = _named(() if short else WITHOUT, only)
        self._journals: dict[str, Journal] = {}
        self.rows: list[Row] = []

    def run(self) -> list[Row]:
        """Everything."""
        cloud = self._cloud
        with contextlib.ExitStack() as stack:
            first = self._create(
                stack, "create, with qemu-guest-agent's channel", cloud.images.qga, 0
            )
            second = self._create(stack, "create, without", cloud.images.plain, 1)
            for operation in self._without:
                self._do(operation, second)
            for operation in self._operations:
                self._do(operation, first)
            self._delete(second, first)
        return self.rows

    # --- making and deleting

    def _create(self, stack: contextlib.ExitStack, title: str, image: str, tenant: int) -> str:
        self._say(f"{title}: for project {TENANTS[tenant]}")
        cloud = self._cloud
        nova = Nova(TENANTS[tenant])
        began_s = time.monotonic()
        uuid = nova.create(f"{TENANTS[tenant]}-server", image, cloud.images.small)
        journal = stack.enter_context(Journal(lambda: cloud.consoles(uuid)))
        self._journals[uuid] = journal
        cloud.nova.wait(uuid, "ACTIVE")
        done_s = time.monotonic()
        back_s = cloud.caller.wait_answered(uuid)
        with Load(cloud.caller, uuid) as load:
            load.wait_answer(back_s + AFTER_S, BACK_TIMEOUT_S)
            sent = load.finish()
        cloud.wait_channel(uuid)
        problem = (cloud.rows(uuid)[cloud.nova.host(uuid)]["problem"]) or ""
        note = f"vchan list: {problem}" if problem else ""
        self._judge(title, Times(began_s, done_s, back_s), sent, uuid, note=note)
        return uuid

    def _delete(self, uuid: str, neighbour: str) -> None:
        """The load goes to a neighbour: to a server that is no more nothing is sent."""

        def delete(cloud: Cloud, _: str) -> str:
            cloud.nova.delete(uuid)
            rows = cloud.rows(uuid)
            if rows:
                raise RigError(f"nova has deleted it, and vchan list has {rows}")
            return "the load is its neighbour's"

        self._do(Operation("delete", delete), neighbour)

    # --- an operation

    def _do(self, operation: Operation, uuid: str) -> None:
        self._say(operation.name)
        cloud = self._cloud
        problem = note = ""
        with Load(cloud.caller, uuid) as load:
            load.wait_answer(time.monotonic() + BEFORE_S, BACK_TIMEOUT_S)
            began_s = time.monotonic()
            try:
                note = operation.act(cloud, uuid)
            except RigError as error:
                problem = str(error)
            done_s = time.monotonic()
            back_s = load.wait_answer(done_s, BACK_TIMEOUT_S)
            if operation.powers_off:
                power_on_all(cloud)
            if back_s is None:
                said = cloud.rows(uuid)
                problem = problem or f"no answer in {BACK_TIMEOUT_S:.0f} s; vchan list: {said}"
            else:
                problem = problem or self._misplaced(uuid)
                load.wait_answer(time.monotonic() + AFTER_S, BACK_TIMEOUT_S)
            sent = load.finish()
        times = Times(began_s, done_s, back_s)
        self._judge(operation.name, times, sent, uuid, operation.kills, problem, note)

    def _misplaced(self, uuid: str) -> str:
        try:
            self._cloud.wait_channel(uuid)
        except RigError as error:
            return str(error)
        return ""

    def _judge(
        self,
        title: str,
        times: Times,
        sent: Sent,
        uuid: str,
        kills: bool = False,
        problem: str = "",
        note: str = "",
    ) -> None:
        journal = self._journals[uuid]
        wanted = {cast.number for cast in sent.casts}
        deadline_s = time.monotonic() + DRAIN_S
        while time.monotonic() < deadline_s:
            if wanted <= {run.number for run in journal.ran()}:
                break
            time.sleep(0.2)
        row = judge(title, times, sent, journal.ran(), kills=kills, problem=problem, note=note)
        self.rows.append(row)
        answer = "none" if row.first_answer_s is None else f"{row.first_answer_s:.1f} s"
        self._say(
            f"    {'well' if row.is_well else 'NOT WELL'}: nova took {row.nova_s:.1f} s, "
            f"first answer after {answer}, "
            f"{row.calls_answered} of {row.calls_sent} calls answered, "
            f"{row.casts_lost} of {row.casts_sent} casts lost {row.problem}".rstrip()
        )


def _named(operations: Sequence[Operation], words: Sequence[str]) -> list[Operation]:
    """Those with one of these words in their name; without words, all."""
    return [each for each in operations if not words or any(word in each.name for word in words)]
