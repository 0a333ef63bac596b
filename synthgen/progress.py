"""How far a stage is: what its workers report while they work."""

from __future__ import annotations

__all__ = ["Progress"]


class Progress:
    """Receives how far a stage is. This one ignores it; the command line draws a bar.

    The runner calls ``start`` and ``stop``; workers call the others.
    """

    def start(self, stage: str, total: int, done: int) -> None:
        """A stage starts: ``total`` samples, of which earlier calls made ``done``."""

    def advance(self, count: int) -> None:
        """So many more samples are made."""

    def skip(self, count: int) -> None:
        """So many samples of a unit were made by an earlier call, or by another process."""

    def describe(self, text: str) -> None:
        """A remark beside the bar, such as the loss."""

    def stop(self) -> None:
        """The stage has ended, with or without an error."""
