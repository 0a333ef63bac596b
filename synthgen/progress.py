"""The progress of a stage, as its workers report it."""

from __future__ import annotations

__all__ = ["Progress"]


class Progress:
    """Receives the progress of a stage. This class ignores it; the command line draws a bar.

    The runner calls ``start`` and ``stop``; workers call the others.
    """

    def start(self, stage: str, total: int, done: int) -> None:
        """A stage of ``total`` samples starts; ``done`` of them exist already."""

    def advance(self, count: int) -> None:
        """``count`` more samples were made."""

    def skip(self, count: int) -> None:
        """``count`` samples of a unit were found done, made by an earlier call or another process."""

    def describe(self, text: str) -> None:
        """Show a text beside the bar, such as the loss."""

    def stop(self) -> None:
        """The stage has ended, with or without an error."""
