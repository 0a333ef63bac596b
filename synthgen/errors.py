"""Errors that a person can act on: each message says what was wrong, where, and what to do.

The command line prints them in one line. :class:`SynthgenError` and its children end with exit code 2,
:class:`UnitsFailed` with 3. Anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from synthgen.redact import redact


class SynthgenError(Exception):
    """Something that the person at the keyboard can put right. Its text never holds a password or token."""

    exit_code = 2

    def __init__(self, *args: object) -> None:
        super().__init__(*(redact(arg) if isinstance(arg, str) else arg for arg in args))


class ConfigError(SynthgenError):
    """A setting is unknown, missing or of the wrong kind."""


class UnknownName(ConfigError):
    """A part, stage or model of this name does not exist."""

    @classmethod
    def among(cls, kind: str, name: str, names: Iterable[str]) -> UnknownName:
        """The error for ``name``, with the nearest of the ``names`` that do exist."""
        known = sorted(names)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return cls(f"unknown {kind} {name!r}; {hint}there are: {', '.join(known) or 'none'}")


class PromptError(SynthgenError):
    """A prompt file cannot be read as one."""


class PipelineError(ConfigError):
    """A pipeline file does not describe a line that can run."""


class MissingArtifact(SynthgenError):
    """A stage needs what an earlier one has not made yet."""


class StaleArtifact(SynthgenError):
    """A folder was made with other settings, or from other inputs, than those asked for now."""


class CorruptFile(SynthgenError):
    """A tar, or a member of one, cannot be read."""


class MissingDependency(SynthgenError):
    """An optional library is not installed."""


class MissingWeights(SynthgenError):
    """A model's weights are not on this machine."""


class TooLittleMemory(SynthgenError):
    """A device cannot hold a model; fewer of them it might."""


class StorageError(SynthgenError):
    """A file could not be written: the disk is full, or the folder may not be written to."""


class UnitsFailed(SynthgenError):
    """Some units failed. The others are done; the same command tries only the failed ones again."""

    exit_code = 3


def one_line(error: BaseException) -> str:
    """What an error says, without secrets, in one line of at most 300 characters; its kind where it says nothing."""
    return redact(" ".join(str(error).split()))[:300] or type(error).__name__
