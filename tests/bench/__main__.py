"""python -m tests.bench: see `scripts/bench --help`."""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.bench import check, counting, native, native_streams, starting, streams, suite
from tests.bench.machine import machine
from tests.bench.suite import GA, IN_AGENT, IN_DAEMON, RAW_ASYNCIO, RAW_C, RAW_PYTHON, RAW_RELAY
from tests.rig import RigError, oslo_image, rig_directory
from tests.rig.ending import end_on_signals
from tests.rig.requirements import (
    missing_for_libvirt,
    missing_for_peers,
    missing_for_qemu,
    missing_for_rabbit,
)

EXIT_SLOWER = 1
EXIT_CANNOT = 3
CALLS, BULK_MIB = 400, 8
STREAM_CALLS, STREAM_BULK_MIB = 150, 4
"""Calls beside six kinds of streams: with more of them it would take more than 2 minutes."""
ATTACK_S = 3.0
"""Of each attack, in each round, and before it."""

EPILOG = """\
exit status: 0 measured; 1 --check found something slower; 2 wrong arguments; 3 this machine lacks a
part, or a part failed
"""
SUBJECTS = (RAW_C, RAW_PYTHON, RAW_ASYNCIO, RAW_RELAY, GA, IN_DAEMON, IN_AGENT)
COLUMNS = (
    ("p50_us", "p50 us", "{:.0f}"),
    ("p99_us", "p99 us", "{:.0f}"),
    ("qemu_cpu_us", "CPU us", "{:.0f}"),
    ("rate_1", "1 /s", "{:.0f}"),
    ("rate_16", "16 /s", "{:.0f}"),
    ("rate_64", "64 /s", "{:.0f}"),
    ("to_guest_mbs", "to MB/s", "{:.1f}"),
    ("from_guest_mbs", "from MB/s", "{:.1f}"),
    ("raw_to_guest_mbs", "raw to", "{:.1f}"),
    ("raw_from_guest_mbs", "raw from", "{:.1f}"),
    ("start_ms", "start ms", "{:.0f}"),
    ("rss_mib", "RSS MiB", "{:.1f}"),
    ("rss_after_mib", "after", "{:.1f}"),
)


def aims(result: Mapping[str, Mapping[str, float]]) -> list[tuple[str, float, str]]:
    """What was aimed at: (what, the ratio or value measured, the aim)."""
    p50, rate_1, rate_64 = result["p50_us"], result["rate_1"], result["rate_64"]
    rows = []
    for subject, aim in ((IN_DAEMON, "<= 1.2"), (IN_AGENT, "<= 1.5")):
        rows.append((f"{subject}: p50 / qemu-ga's", p50[subject] / p50[GA], aim))
        rows.append((f"{subject}: p50 / raw Python's", p50[subject] / p50[RAW_PYTHON], "<= 2"))
        ratio = rate_64[subject] / rate_1[GA]
        rows.append((f"{subject}: 64 in flight / qemu-ga, serial", ratio, ">= 10"))
    for measure, way in (("to_guest_mbs", "to the guest"), ("from_guest_mbs", "from the guest")):
        speed = result[measure]
        for subject in (IN_DAEMON, IN_AGENT):
            if subject in speed:
                ratio = speed[subject] / speed[RAW_PYTHON]
                rows.append((f"{subject}: 64 KiB {way} / raw Python", ratio, ">= 0.5"))
                ratio = speed[subject] / result["from_guest_mbs"][GA]
                rows.append((f"{subject}: 64 KiB {way} / qemu-ga's file read", ratio, ">= 5"))
    for measure, way in (("raw_to_guest_mbs", "to"), ("raw_from_guest_mbs", "from")):
        ratio = result[measure][IN_AGENT] / result["from_guest_mbs"][GA]
        rows.append((f"64 KiB, raw, {way} the guest / qemu-ga's file read", ratio, ">= 2.5"))
    rows.append(("daemon: start, s", result["start_ms"][IN_DAEMON] / 1000, "< 1"))
    rows.append(("daemon: RSS, MiB", result["rss_mib"][IN_DAEMON], "< 25"))
    return rows


def table(result: Mapping[str, Any]) -> str:
    """The result, for people."""
    width = max(map(len, SUBJECTS)) + 1
    lines = ["round trips of 64 bytes; calls/s with 1, 16, 64 in flight; 64 KiB to and from it"]
    lines.append(" " * width + "".join(f"{title:>10}" for _, title, _ in COLUMNS))
    for subject in SUBJECTS:
        cells = []
        for measure, _, form in COLUMNS:
            value = result[measure].get(subject)
            cells.append(f"{form.format(value) if value is not None else '':>10}")
        lines.append(f"{subject:<{width}}" + "".join(cells))
    lines.append(
        "start: to the first byte, of qemu-ga's to its answer; RSS: at rest, after the load"
    )
    lines += ["", "a frame with 64 bytes of payload, on the host (us)      encode    decode"]
    for name, cost in result["frame_us"].items():
        lines.append(f"{name:<52}{cost['encode_us']:>10.2f}{cost['decode_us']:>10.2f}")
    lines += ["", native.table(result["native"])]
    lines += ["", "against the aims"]
    lines += [f"{what:<60}{value:>8.2f}   aim {aim}" for what, value, aim in aims(result)]
    lines += ["", f"machine's load: {result['load'][0]:.1f} before, {result['load'][1]:.1f} after"]
    return "\n".join(lines)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Measures vchan beside the raw channel and qemu-ga, in one guest and one run.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=7, help="turns through everything [7]")
    parser.add_argument(
        "--calls", type=int, help=f"round trips per turn [{CALLS}; --streams: {STREAM_CALLS}]"
    )
    parser.add_argument(
        "--bulk-mib",
        type=int,
        help=f"MiB per bulk transfer [{BULK_MIB}; --streams: {STREAM_BULK_MIB}]",
    )
    parser.add_argument(
        "--processors",
        type=int,
        default=1,
        help="of the guest, without any of the following [%(default)s]",
    )
    parser.add_argument(
        "--instructions",
        action="store_true",
        help="count the guest's instructions instead of time: for a machine that is not quiet",
    )
    parser.add_argument(
        "--native",
        action="store_true",
        help="without a guest: the same programs beside qemu-ga and raw echoes on this machine",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="instructions and CPU a call beside the numbers that are kept: 10 %% more fails; "
        "with --instructions those alone, which a busy machine does not change",
    )
    parser.add_argument(
        "--keep", action="store_true", help="with --check: keep what is measured from now on"
    )
    parser.add_argument(
        "--start",
        action="store_true",
        help="how soon the daemon is there, and where the time goes",
    )
    parser.add_argument(
        "--broker",
        action="store_true",
        help="through RabbitMQ, beside stock oslo.messaging, natively; and many VMs on one host",
    )
    parser.add_argument(
        "--broker-guest",
        action="store_true",
        help="through RabbitMQ, agents in one guest: on rabbit:// over its network card, on vchan",
    )
    parser.add_argument(
        "--streams",
        action="store_true",
        help="byte streams beside a raw port, qemu-ga, TCP and ssh over a network card, one guest; "
        "and calls beside a stream that is never idle; with --native both daemons on this machine",
    )
    parser.add_argument(
        "--attacks",
        action="store_true",
        help="named attacks on a host's daemon: what another VM's calls take before and during",
    )
    parser.add_argument(
        "--migration",
        action="store_true",
        help="a VM that migrates --rounds times: from when it runs to the first answer, step by "
        "step, from the daemons' debug logs",
    )
    parser.add_argument(
        "--vms",
        default="1,50,300,1000",
        help="with --broker: numbers of VMs, or none [%(default)s]",
    )
    parser.add_argument(
        "--beside",
        type=Path,
        metavar="TREE",
        help="with --broker: only what a message costs the host, in turns with vchan-host as "
        "another tree has it: build/compiled, say",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    options = parser.parse_args()
    is_emulated = options.streams and not options.native
    defaults = (STREAM_CALLS, STREAM_BULK_MIB) if is_emulated else (CALLS, BULK_MIB)
    options.calls = defaults[0] if options.calls is None else options.calls
    options.bulk_mib = defaults[1] if options.bulk_mib is None else options.bulk_mib
    if min(options.rounds, options.calls, options.bulk_mib, options.processors) < 1:
        parser.error("--rounds, --calls, --bulk-mib and --processors must be at least 1")
    vms = [int(word) for word in options.vms.split(",") if word.isdecimal()]
    if options.keep and (options.instructions or not options.check):
        parser.error("--keep goes with --check, and keeps all of its numbers")
    missing = _missing(options)
    if missing:
        print(f"bench: {missing}", file=sys.stderr)
        return EXIT_CANNOT
    try:
        with rig_directory() as directory:
            if options.broker:
                report = measure_broker(directory, options, vms)
            elif options.broker_guest:
                report = measure_broker_guest(directory, options)
            elif options.streams and options.native:
                report = measure_native_streams(directory, options)
            elif options.streams:
                report = measure_streams(directory, options)
            elif options.attacks:
                report = measure_attacks(directory, options)
            elif options.migration:
                report = measure_migration(directory, options)
            elif options.start:
                report = measure_start(directory)
            elif options.native:
                report = measure_native(directory, options)
            elif options.check:
                return check_kept(directory, options)
            else:
                report = count(directory) if options.instructions else measure(directory, options)
    except RigError as error:
        print(f"bench: {error}", file=sys.stderr)
        return EXIT_CANNOT
    result, text = report
    print(json.dumps(result) if options.json else text)
    return 0


def _missing(options: argparse.Namespace) -> str | None:
    if options.streams and options.native:
        return None
    if options.broker_guest:
        return missing_for_rabbit() or missing_for_qemu() or oslo_image.can_carry()
    if options.attacks:
        return missing_for_libvirt()
    if options.migration:
        return missing_for_rabbit() or missing_for_libvirt()
    return missing_for_rabbit() if options.broker else missing_for_peers()


def count(directory: Path) -> tuple[Any, str]:
    """Count instructions."""
    rows = counting.measure(directory)
    return dict(rows), counting.table(rows)


def measure_broker(directory: Path, options: argparse.Namespace, vms: list[int]) -> tuple[Any, str]:
    """Measure what goes through a broker."""
    from tests.bench import broker  # here: it needs oslo.messaging

    if options.beside:
        trees = (broker.ROOT, options.beside.resolve())
        costs = broker.costs(directory, rounds=options.rounds, vms=vms, trees=trees)
        return costs, broker.costs_table(costs)
    before = suite.load()
    result = broker.run(directory, rounds=options.rounds, calls=options.calls, vms=vms)
    result["load"] = (before, suite.load())
    return result, broker.table(result)


def measure_broker_guest(directory: Path, options: argparse.Namespace) -> tuple[Any, str]:
    """Measure agents in one guest, called through a broker."""
    from tests.bench import broker_guest  # here: it needs oslo.messaging

    before = suite.load()
    result = broker_guest.run(directory, rounds=options.rounds, calls=options.calls)
    result["load"] = (before, suite.load())
    return result, broker_guest.table(result)


def measure_streams(directory: Path, options: argparse.Namespace) -> tuple[Any, str]:
    """Measure byte streams, and calls beside them."""
    before = suite.load()
    result = streams.run(
        directory,
        rounds=options.rounds,
        calls=options.calls,
        bulk_bytes=options.bulk_mib << 20,
    )
    result["load"] = (before, suite.load())
    return result, streams.table(result)


def measure_native_streams(directory: Path, options: argparse.Namespace) -> tuple[Any, str]:
    """The same without a guest."""
    before = suite.load()
    result = native_streams.run(
        directory,
        rounds=options.rounds,
        calls=options.calls,
        bulk_bytes=options.bulk_mib << 20,
    )
    result["load"] = (before, suite.load())
    return result, native_streams.table(result)


def measure_attacks(directory: Path, options: argparse.Namespace) -> tuple[Any, str]:
    """Measure what attacks cost."""
    from tests.attack import crowd, run  # here: it needs the host's side

    before = suite.load()
    rows = list(run.measure(directory, seconds=ATTACK_S, rounds=options.rounds))
    load = (before, suite.load())
    lines = [run.HEAD, *map(run.line, rows)]
    lines.append(f"machine's load: {load[0]:.1f} before, {load[1]:.1f} after")
    with rig_directory() as another:
        many = crowd.measure(another)
    lines += ["", crowd.table(many)]
    return {"attacks": rows, "crowd": many, "load": load}, "\n".join(lines)


def measure_migration(directory: Path, options: argparse.Namespace) -> tuple[Any, str]:
    """Measure how long a VM that migrates cannot be called."""
    from tests.bench import migration  # here: it needs oslo.messaging

    before = suite.load()
    result = migration.run(directory, migrations=options.rounds)
    result["load"] = (before, suite.load())
    return result, migration.table(result)


def measure_native(directory: Path, options: argparse.Namespace) -> tuple[Any, str]:
    """Measure without a guest."""
    before = suite.load()
    result = native.measure(
        directory, suite.small_body(), rounds=options.rounds, calls=options.calls
    )
    load = (before, suite.load())
    ratios = {what: ratio for what, ratio, _ in native.ratios(result)}
    text = f"{native.table(result)}\nmachine's load: {load[0]:.1f} before, {load[1]:.1f} after"
    return {"native": result, "ratios": ratios, "load": load}, text


def check_kept(directory: Path, options: argparse.Namespace) -> int:
    """Measure, compare, say what is slower."""
    kept = {} if options.keep else check.load(counts_only=options.instructions)
    if not kept and not options.keep:
        print(f"bench: nothing is kept for this release ({check.KEPT.name}): nothing is compared")
        return 0
    numbers = check.count(directory)
    if not options.instructions:
        numbers |= check.time_cpu(directory, suite.small_body(), kept)
    if options.keep:
        check.keep(numbers)
        kept = check.load()
    rows = check.compare(numbers, kept)
    print(json.dumps(numbers) if options.json else check.table(rows))
    found = check.problems(rows)
    for problem in found:
        print(f"bench: {problem}", file=sys.stderr)
    return EXIT_SLOWER if found else 0


def measure_start(directory: Path) -> tuple[Any, str]:
    """Measure the daemon's start."""
    before = suite.load()
    result = starting.run(directory)
    result["load"] = (before, suite.load())
    return result, starting.table(result)


def measure(directory: Path, options: argparse.Namespace) -> tuple[Any, str]:
    """Measure time and memory."""
    before = suite.load()
    with machine(directory, processors=options.processors) as guest:
        result = suite.run(
            guest,
            directory,
            rounds=options.rounds,
            calls=options.calls,
            bulk_bytes=options.bulk_mib << 20,
        )
    result["load"] = (before, suite.load())
    return result, table(result)


if __name__ == "__main__":
    end_on_signals()
    sys.exit(main())
