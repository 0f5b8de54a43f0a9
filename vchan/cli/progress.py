"""How far a copy is: the line that a terminal shows of it. Pure.

Size  done  rate  how long it takes yet
"""

from __future__ import annotations

from typing import Final

from vchan.cli.output import padded, shortened

STALLED_S: Final = 5.0
"""Without a byte for so long a copy is said to be stalled: its VM moves, perhaps."""
RATE_S: Final = 3.0
"""The rate is that of about so long."""
LOOK_S: Final = 0.001
"""In less nothing can be said of a rate."""
ETA_S_MAX: Final = 359_999.0
"""What is longer is shown as 99:59:59: nobody waits for it."""
NAME_COLUMNS_MIN: Final = 8
"""Of a file's name: less says nothing."""
_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")


def size_text(size: float) -> str:
    """A number of bytes in four digits and a unit."""
    unit = 0
    while size >= 1000 and unit + 1 < len(_UNITS):
        size /= 1024
        unit += 1
    return f"{size:.0f} {_UNITS[unit]}" if unit == 0 else f"{size:.1f} {_UNITS[unit]}"


def time_text(time_s: float) -> str:
    """Minutes and seconds, and hours if there are any."""
    minutes, seconds = divmod(int(time_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}"


class CopyProgress:
    """Bytes through, and how fast.

    Args:
        now_s: Of a clock that never goes back.
    """

    def __init__(self, now_s: float) -> None:
        self.files = 0
        self.bytes = 0
        self._began_s = now_s
        self._name = ""
        self._at = 0
        self._size = 0
        self._rate = 0.0
        self._looked_s = now_s
        self._looked_bytes = 0
        self._moved_s = now_s

    def begins(self, name: str, at: int, size: int) -> None:
        """A file's bytes come, from `at` on: what is before that was there already."""
        self.files += 1
        self._name, self._at, self._size = name, at, size

    def moved(self, count: int) -> None:
        """So many more bytes are through."""
        self._at += count
        self.bytes += count

    def line(self, now_s: float, columns: int) -> str:
        """What the terminal shows now. To be asked a few times a second."""
        self._look(now_s)
        share = 100 * self._at // self._size if self._size else 100
        numbers = f"{share:3}%  {size_text(self._at):>10}  {self._pace(now_s)}"
        room = columns - len(numbers) - 3
        if room < NAME_COLUMNS_MIN:
            return shortened(numbers, max(1, columns - 1))
        return f"{padded(shortened(self._name, room), room)}  {numbers}"

    def _look(self, now_s: float) -> None:
        passed_s = now_s - self._looked_s
        if passed_s < LOOK_S:
            return
        moved = self.bytes - self._looked_bytes
        if moved:
            self._moved_s = now_s
        is_first = self._looked_bytes == 0
        weight = 1.0 if is_first else min(1.0, passed_s / RATE_S)
        self._rate += weight * (moved / passed_s - self._rate)
        self._looked_s, self._looked_bytes = now_s, self.bytes

    def _pace(self, now_s: float) -> str:
        """Rate, and the time that is left."""
        if now_s - self._moved_s >= STALLED_S and self._at < self._size:
            return f"{'stalled':>12}  {time_text(now_s - self._moved_s)}    "
        left = (self._size - self._at) / self._rate if self._rate else 0.0
        eta = f"{time_text(min(left, ETA_S_MAX))} ETA" if self._rate or not left else " " * 9
        return f"{size_text(self._rate) + '/s':>12}  {eta}"

    def summary(self, now_s: float) -> str:
        """What is said of it in the end."""
        took_s = max(0.001, now_s - self._began_s)
        files = f"{self.files} file{'s' * (self.files != 1)}"
        rate = size_text(self.bytes / took_s)
        return f"{files}, {size_text(self.bytes)} in {time_text(took_s)}, {rate}/s"
