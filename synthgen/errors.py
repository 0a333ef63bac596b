"""User errors: each message says what is wrong, where, and what to do.

The command line prints them in one line and exits with code 2 (:class:`UnitsFailed`: 3). Any other exception is a bug
and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

from synthgen.redact import redact


class SynthgenError(Exception):
    """An error that the user can fix. Its text never contains a password or token.

    Args:
        problem: what is wrong, and where.
        advice: what to do; the text is both, with a semicolon between. May be part of ``problem`` unless a caller
            needs the problem alone.
    """

    exit_code = 2

    def __init__(self, problem: str, advice: str = "") -> None:
        super().__init__(*map(redact, (problem, advice) if advice else (problem,)))

    def __str__(self) -> str:
        return "; ".join(self.args)

    @property
    def problem(self) -> str:
        """The text without ``advice``."""
        return str(self.args[0])


class ConfigError(SynthgenError):
    """A setting is unknown, missing or of the wrong type."""


class UnknownName(ConfigError):
    """A part, stage or model of this name does not exist."""

    @classmethod
    def among(cls, kind: str, name: str, names: Iterable[str]) -> UnknownName:
        """The error for ``name``, with the nearest of the ``names`` that do exist."""
        known = sorted(set(names))
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return cls(f"unknown {kind} {name!r}; {hint}there are: {', '.join(known) or 'none'}")


class PromptError(SynthgenError):
    """A prompt or caption, or a file of them, cannot be read."""


class PipelineError(ConfigError):
    """A pipeline file does not describe stages that can run."""


class MissingArtifact(SynthgenError):
    """A stage needs the output of an earlier one, which is missing."""


class StaleArtifact(SynthgenError):
    """A folder was made with other settings, or from other inputs, than those given now."""


class CorruptFile(SynthgenError):
    """A tar, or a member of one, cannot be read.

    Args:
        path: the file, if its checksum is wrong.
    """

    def __init__(self, problem: str, advice: str = "", *, path: Path | None = None) -> None:
        super().__init__(problem, advice)
        self.path = path


class MissingDependency(SynthgenError):
    """An optional library is not installed."""


class MissingWeights(SynthgenError):
    """A model's weights are not on this machine."""


class TooLittleMemory(SynthgenError):
    """A device has too little memory for that many copies of a model; fewer might fit."""


class StorageError(SynthgenError):
    """A file could not be written: the disk is full, or the folder may not be written to."""


class UnitsFailed(SynthgenError):
    """Some units failed. The others are done; the same command tries only the failed ones again."""

    exit_code = 3


def one_line(error: BaseException) -> str:
    """The text of an error, without secrets, in one line of at most 300 characters; its type if it has no text."""
    return redact(" ".join(str(error).split()))[:300] or type(error).__name__
