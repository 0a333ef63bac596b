"""The ``synthgen`` command, also as ``python -m synthgen``.

Exit codes: 0 done; 2 user error (command, file or setting); 3 some units failed (the same command retries only those);
130 stopped by Ctrl-C (the same command resumes). Anything else is a bug and prints its traceback.
"""

from __future__ import annotations

import sys
import traceback

from synthgen.cli import app
from synthgen.errors import SynthgenError, one_line

__all__ = ["main"]


def main() -> None:
    """Run the command line; a user error is printed as one line without control characters."""
    from synthgen.redact import redact
    from synthgen.text import plain

    try:
        code = app(standalone_mode=False)
    except SynthgenError as error:
        print(f"synthgen: {plain(str(error))}", file=sys.stderr)
        code = error.exit_code
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None and not isinstance(error, FileNotFoundError):
            print(f"synthgen: {plain(_refused(error))}", file=sys.stderr)
            sys.exit(2)
        if not hasattr(error, "format_message"):  # the parser's own errors have one; anything else is a bug
            print(redact(traceback.format_exc()), end="", file=sys.stderr)
            sys.exit(1)
        if type(error).__name__ == "NoArgsIsHelpError":  # not an error: the bare command asks for help
            print(error.format_message())
            sys.exit(0)
        command = getattr(getattr(error, "ctx", None), "command_path", "synthgen")
        message = error.format_message().rstrip(".")
        print(f"synthgen: {plain(redact(message))}; see: {command} --help", file=sys.stderr)
        code = 2
    if code == 130:
        print("synthgen: stopped; run the same command again to resume", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


def _refused(error: OSError) -> str:
    """The one-line message for what the operating system refuses, such as reading another user's folder."""
    why = error.strerror or type(error).__name__
    return f"{one_line(OSError(error.filename))}: {why}; fix this, or give another path"


if __name__ == "__main__":
    main()
