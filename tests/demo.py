"""The main job, on real parts: RPC into a VM through live migrations under load, counted.

A private RabbitMQ, two compute hosts (a libvirtd and a vchan-host each), one QEMU guest with
vchan-guest and two agents, an unmodified oslo.messaging client that calls and casts to one of them,
and an unmodified oslo.messaging server that the other one calls and casts to, while the guest
migrates between the hosts. Meanwhile 64 MiB are copied into the guest and out of it, again and
again, two connections through a forward are never idle, and a shell in the guest is asked one thing
after the other. At the end each side is asked what it ran, and the ends are compared.
"""

import argparse
import contextlib
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.rig import RigError, asking, copy_traffic, stream_traffic
from tests.rig.asking import ASKER, Asked
from tests.rig.compute import ComputeHost, agent_service
from tests.rig.control_service import ControlService
from tests.rig.ending import end_on_signals
from tests.rig.guest_image import build
from tests.rig.kept import cache_directory
from tests.rig.rabbit import RabbitServer
from tests.rig.requirements import missing_for_libvirt, missing_for_qemu, missing_for_rabbit
from tests.rig.stream_traffic import StreamTraffic
from tests.rig.traffic import Report, TrafficProcess
from vchan.client import Client
from vchan.host.hypervisor.domains import DomainEvent, Happened
from vchan.host.hypervisor.libvirt_client import Hypervisor

VM = "demo-vm"
TOPIC = "demo"
CONTROL_TOPIC = "control"
MEMORY_MIB = 320
"""Of the guest, and three times what is copied: that lies in its memory."""
EXIT_LOST = 1
EXIT_CANNOT = 3
ROWS = (
    ("migrations", "live migrations"),
    ("calls_sent", "calls sent"),
    ("calls_answered", "calls answered"),
    ("casts_sent", "casts sent, and"),
    ("casts_executed", "casts executed"),
    ("guest_calls_sent", "calls sent by the guest"),
    ("guest_calls_answered", "calls answered"),
    ("guest_casts_sent", "casts sent by it, and"),
    ("guest_casts_executed", "casts executed"),
    ("lost", "LOST"),
    ("duplicated", "DUPLICATED"),
    ("reordered", "REORDERED"),
    ("copied_bytes", "bytes copied in and out"),
    ("forwarded_bytes", "bytes forwarded, both ways"),
    ("shell_answers", "answers of the shell"),
    ("stream_bytes", "bytes by streams"),
    ("streams_broken", "STREAMS BROKEN"),
    ("losses_detected", "losses detected"),
    ("frames_resent", "frames resent"),
)
EPILOG = """\
losses_detected counts holes found in a session, plus frames sent and not acknowledged when a
session ended (by migration they may be lost; that is not told apart). frames_resent counts frames
repeated within a session, plus requests handed to the guest again in a later one. casts includes
fanouts. LOST, DUPLICATED and REORDERED count both directions. Bytes by streams (stream_bytes) are
those of copies whose checksums are right at both ends, and of connections through the forward to
which every byte came back once and in order. BROKEN (streams_broken) are copies and connections
that failed or brought other bytes, and the shell, if it said anything but the right answers or was
not one process to its end.

exit status: 0 nothing lost, duplicated, reordered or broken; 1 something was; 2 wrong arguments; 3
this machine lacks a part, or a part failed
"""


class Watch:
    """Notes when a guest resumes on a host after a migration."""

    def __init__(self, host: ComputeHost) -> None:
        self.resumed_s: list[float] = []
        self._hypervisor = Hypervisor(host.libvirt.uri, self._note)
        self._hypervisor.start()

    def _note(self, event: object) -> None:
        if isinstance(event, Happened) and event.event is DomainEvent.RESUMED_MIGRATED:
            self.resumed_s.append(time.monotonic())

    def stop(self) -> None:
        """End it."""
        self._hypervisor.stop()


class Demo:
    """One run.

    Args:
        directory: For everything it makes; see `rig_directory`.
    """

    def __init__(self, options: argparse.Namespace, directory: Path) -> None:
        self._options = options
        self._directory = directory
        self._random = random.Random(options.seed)
        self._start_s = time.monotonic()

    def say(self, text: str) -> None:
        """A line of progress."""
        print(f"{time.monotonic() - self._start_s:6.1f} s  {text}", flush=True)

    def run(self) -> dict[str, Any]:
        """Everything; returns the figures."""
        directory = self._directory
        rig = Path(__file__).with_name("rig")
        programs: dict[str, bytes | Path] = {
            "app/agent.py": rig / "counting_agent.py",
            "app/asker.py": rig / "asking_agent.py",
            **stream_traffic.FILES,
        }
        with contextlib.ExitStack() as stack:
            self.say("building the guest: kernel, CPython, vchan")
            image = build(programs).staged(directory)
            self.say("starting RabbitMQ")
            (directory / "rabbit").mkdir()
            rabbit = stack.enter_context(RabbitServer(directory / "rabbit"))
            hosts = []
            for number, name in enumerate("ab", 1):
                self.say(f"starting host{number}: libvirtd and vchan-host")
                host = ComputeHost(
                    directory / name, number, cache_directory() / "libvirt", rabbit.url
                )
                hosts.append(stack.enter_context(host))
                policy = host.daemon.policy
                policy.write_text(policy.read_text() + stream_traffic.POLICY)
                host.daemon.signal(signal.SIGHUP)
            watches = [Watch(host) for host in hosts]
            for watch in watches:
                stack.callback(watch.stop)
            self.say("booting the guest on host1: vchan-guest, three agents, an echo")
            agent = agent_service("agent", "/app/agent.py", TOPIC)
            services = [*stream_traffic.SERVICES, agent, ASKER]
            memory_mib = MEMORY_MIB + 3 * self._options.copy_mib
            uuid = hosts[0].start_vm(VM, image, services, memory_mib=memory_mib)
            topics = [TOPIC, asking.TOPIC, copy_traffic.TOPIC]
            hosts[0].daemon.wait_ready(VM, topics=topics)
            self.say(f"ready: {uuid} serves topic {TOPIC}")
            mib = self._options.copy_mib
            self.say(f"beginning the streams: copies of {mib} MiB each way, a forward, a shell")
            streams = StreamTraffic(VM, uuid, hosts, directory, copy_bytes=mib << 20)
            stack.enter_context(streams)
            report, asked = self._migrate(rabbit.url, uuid, hosts, streams)
            self.say("ending the streams: waiting for the last copies")
            streams.finish()
            for problem in streams.problems:
                self.say(f"broken: {problem}")
            return self._figures(report, asked, hosts, watches) | stream_figures(streams)

    def _migrate(
        self, url: str, uuid: str, hosts: list[ComputeHost], streams: StreamTraffic
    ) -> tuple[Report, Asked]:
        directory = self._directory
        options = {"fanouts_per_s": 5, "casts_per_s": 50, "callers": 3}
        with (
            ControlService(url, CONTROL_TOPIC, directory / "control.log") as service,
            TrafficProcess(url, uuid, TOPIC, directory / "traffic.log", **options) as traffic,
        ):
            traffic.wait_for("calls_answered", 20)
            source, destination = hosts

            def call_asker(method: str, **args: Any) -> Any:
                with Client(str(source.daemon.socket)) as client:
                    return client.call(asking.TOPIC, method, args, server=uuid)

            asker = asking.Asker(call_asker, service, CONTROL_TOPIC, "guest-")
            asker.flows(5)
            for number in range(1, self._options.migrations + 1):
                time.sleep(self._random.uniform(0.2, 2.0))
                start_s = time.monotonic()
                source.migrate(VM, destination)
                took_s = time.monotonic() - start_s
                streams.wait_moved()
                so_far = traffic.progress
                self.say(
                    f"migration {number}: {source.name} to {destination.name} in {took_s:.1f} s; "
                    f"{so_far['calls_answered']} of {so_far['calls_sent']} calls answered, "
                    f"{streams.forwarded_bytes / 1e6:.0f} MB forwarded"
                )
                source, destination = destination, source
            time.sleep(1.0)
            self.say("stopping the traffic; asking both ends what they ran")
            asked = asker.finish()
            if asked.errors:
                self.say(f"the guest's requests: {asked.errors}")
            return traffic.finish(), asked

    def _figures(
        self, report: Report, asked: Asked, hosts: list[ComputeHost], watches: list[Watch]
    ) -> dict[str, Any]:
        totals = [host.daemon.call("status")["totals"] for host in hosts]
        last = hosts[self._options.migrations % 2]
        guest = last.cli_json("call", VM, "vchan.guest", "info")

        def both(*names: str) -> int:
            return sum(total[name] for total in totals for name in names)

        return {
            "migrations": self._options.migrations,
            "calls_sent": report.calls_sent,
            "calls_answered": report.calls_answered,
            "casts_sent": report.casts_sent + report.fanouts_sent,
            "casts_executed": report.casts_executed + report.fanouts_executed,
            "guest_calls_sent": asked.calls_sent,
            "guest_calls_answered": asked.calls_answered,
            "guest_casts_sent": asked.casts_sent,
            "guest_casts_executed": asked.casts_executed,
            "lost": report.lost + report.wrong_answers + asked.lost,
            "duplicated": report.duplicated + asked.duplicated,
            "reordered": report.reordered + asked.reordered,
            "losses_detected": both("losses", "frames_in_doubt") + guest["session"]["losses"],
            "frames_resent": both("frames_resent")
            + guest["session"]["frames_resent"]
            + guest["repeats"],
            "first_answer_ms": [
                round((min(after) - resumed_s) * 1000, 1)
                for resumed_s in sorted(s for watch in watches for s in watch.resumed_s)
                if (after := [at_s for at_s in report.answers_s if at_s > resumed_s])
            ],
        }


def stream_figures(streams: StreamTraffic) -> dict[str, int]:
    """What the byte streams carried."""
    return {
        "copied_bytes": streams.copied_bytes,
        "forwarded_bytes": streams.forwarded_bytes,
        "shell_answers": streams.shell_answers,
        "stream_bytes": streams.copied_bytes + streams.forwarded_bytes,
        "streams_broken": len(streams.problems),
    }


def status(figures: Mapping[str, Any]) -> int:
    """The exit status: whether anything was lost, doubled, reordered or broken."""
    wrong = ("lost", "duplicated", "reordered", "streams_broken")
    return EXIT_LOST if any(figures[name] for name in wrong) else 0


def show(figures: dict[str, Any]) -> None:
    """The table."""
    print()
    for name, title in ROWS:
        print(f"  {title:26} {figures[name]:10}")
    answers = figures["first_answer_ms"]
    if answers:
        ordered = sorted(answers)
        print("  RESUMED to the first answer, ms")
        print(f"    {'median':26} {ordered[len(ordered) // 2]:8.1f}")
        print(f"    {'worst':26} {ordered[-1]:8.1f}")
        print(f"    each: {', '.join(f'{value:.0f}' for value in answers)}")
    print()


@contextlib.contextmanager
def workplace(keep: bool) -> Iterator[Path]:
    """A directory with a short name, which other users may enter."""
    directory = Path(tempfile.mkdtemp(prefix="vc", dir="/tmp"))
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        if keep:
            print(f"logs: {directory}")
        else:
            shutil.rmtree(directory, ignore_errors=True)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/demo",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--migrations", type=int, default=3, metavar="N", help="[%(default)s]")
    parser.add_argument("--copy-mib", type=int, default=64, metavar="N", help="[%(default)s]")
    parser.add_argument("--seed", type=int, default=1, help="of the pauses between them")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--keep", action="store_true", help="keep the logs")
    options = parser.parse_args(arguments)
    if min(options.migrations, options.copy_mib) < 1:
        parser.error("--migrations and --copy-mib must be at least 1")
    return options


def main() -> int:
    """The command."""
    options = parse(sys.argv[1:])
    for missing in (missing_for_rabbit(), missing_for_libvirt(), missing_for_qemu()):
        if missing:
            print(f"scripts/demo: {missing}", file=sys.stderr)
            return EXIT_CANNOT
    try:
        with workplace(options.keep) as directory:
            figures = Demo(options, directory).run()
    except RigError as error:
        print(f"scripts/demo: {error}", file=sys.stderr)
        return EXIT_CANNOT
    show(figures)
    if options.json:
        print(json.dumps(figures))
    return status(figures)


if __name__ == "__main__":
    end_on_signals()
    sys.exit(main())
