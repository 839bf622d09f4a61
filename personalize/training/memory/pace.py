"""Whether a run became suddenly slow, as one does whose memory spills over into the host's."""

from __future__ import annotations

from statistics import median

WARM = 3  # first steps, which compile and tune
LAST = 10  # steps that must be slow
COLLAPSE = 3.0  # times slower than before


class Pace:
    """The seconds of a run's steps so far."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.told = False

    def slower(self, seconds: float) -> float:
        """After one more step: how many times slower the last ones are than those before, once, if that is a collapse; else 0."""
        self.seconds.append(seconds)
        before, last = self.seconds[WARM:-LAST], self.seconds[-LAST:]
        if self.told or len(before) < LAST or median(last) <= COLLAPSE * median(before):
            return 0.0
        self.told = True
        return median(last) / median(before)
