"""Read untrusted files within limits on memory and time.

Every function raises ``ValueError`` (or ``OSError``, if there is no file), which callers turn into an error that names
the file. Arrays and images have their own: :func:`synthgen.codecs.read_npz`, :func:`synthgen.image.decode_rgb`.
"""

from __future__ import annotations

import codecs
import io
import json
import math
import re
import shlex
import stat
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from synthgen.stores.remote import RemotePath

__all__ = [
    "MAX_BYTES",
    "MAX_JSON",
    "MAX_LINE_LENGTH",
    "MAX_PROMPTS",
    "MAX_SETTINGS",
    "MAX_WORDS",
    "MAX_YAML",
    "SAFE_LOADER",
    "is_object",
    "iter_text",
    "read_chunks",
    "read_file",
    "read_json",
    "read_lines",
    "read_yaml",
    "shortened",
    "visible",
]

MAX_BYTES = 2**28  # of a file or tar member that is read into memory at once
MAX_JSON = 2**24  # bytes of a JSON object that describes a sample, a unit or a folder
MAX_PROMPTS = 2**32  # bytes of a prompt file; ten million prompts are about 1e9
MAX_YAML = 2**18  # bytes of a YAML file
MAX_WORDS = 255  # masks of one image: what 8 bits can number
MAX_LINE_LENGTH = 2**16  # characters of a line of prompts or captions
SAFE_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # both are safe; the one in C is ten times as fast
_CHUNK = 2**18  # bytes of text read at a time
MAX_SETTINGS = 200_000  # values of the settings of an artifact, which may list thousands of input files
_MAX_VALUES = 20_000  # values of any other YAML file, each counted once for every reference
_DEEPEST = 100  # levels of nested mappings and lists
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_CONTROL = {number: " " for number in (*range(32), *range(127, 160)) if number != ord("\t")}


def read_file(path: Path, most: int = MAX_BYTES) -> bytes:
    """The bytes of a regular file of at most ``most`` bytes; pipes and devices, which may never end, are refused.

    Raises:
        OSError: there is no such file, or it is not a regular file.
        ValueError: it is larger.
    """
    return b"".join(read_chunks(path, most, size=most))


def read_chunks(path: Path, most: int = MAX_BYTES, size: int = 2**20) -> Iterator[bytes]:
    """The same bytes as :func:`read_file`, ``size`` at a time.

    Raises:
        OSError, ValueError: as for :func:`read_file`, before the first bytes.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):  # opening a folder raises its own error
        raise OSError(f"{path} is not a regular file")
    if status.st_size > most:
        raise ValueError(f"it is larger than {most:,} bytes")
    if isinstance(path, RemotePath):  # small files that change during a run: not cached
        yield path.read_bytes()
        return
    with open(path, "rb") as file:
        remaining = status.st_size  # bytes appended meanwhile are not read
        while remaining and (data := file.read(min(remaining, size))):
            remaining -= len(data)
            yield data


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file with their endings, each at most ``MAX_LINE_LENGTH`` characters long.

    A line ends with a line feed, a carriage return, or both.

    Raises:
        OSError: there is no such file, or it is not a regular file.
        ValueError: it is not UTF-8 (``UnicodeDecodeError`` is a subclass), contains a zero byte, or has a longer line.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(f"{path} is not a regular file")
    with open(path, encoding="utf-8-sig", newline="") as file:
        while line := file.readline(MAX_LINE_LENGTH + 1):
            if len(line) > MAX_LINE_LENGTH:
                raise ValueError(f"a line has more than {MAX_LINE_LENGTH:,} characters")
            if "\0" in line:
                raise ValueError("it is not UTF-8 text, as it holds zero bytes; save it as UTF-8")
            yield line


def iter_text(path: Path, most: int) -> Iterator[tuple[int, str]]:
    """The non-empty lines of a UTF-8 file with their numbers; stripped, and with control characters as spaces.

    The file is read in chunks and may have up to ``most`` bytes. A line ends as in :func:`read_lines`.

    Raises:
        OSError, ValueError: as for :func:`read_lines`, or the file is larger.
    """
    number, tail, decoded = 0, "", 0
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    for data in chain(read_chunks(path, most, _CHUNK), [b""]):  # the empty chunk ends the last line
        if (zero := data.find(0)) >= 0:
            raise _not_text(path, decoded + zero, 0)
        try:
            *lines, tail = (tail + decoder.decode(data, not data)).split("\n")
        except UnicodeDecodeError as error:
            place = decoded - len(error.object) + len(data) + error.start
            raise _not_text(path, place, error.object[error.start]) from None
        decoded += len(data)
        for line in lines if data else [*lines, tail]:
            number += 1
            if text := visible(_within_length(number, line)).strip():
                yield number, text
        _within_length(number + 1, tail)


def _within_length(number: int, line: str) -> str:
    if len(line) > MAX_LINE_LENGTH:
        raise ValueError(f"line {number}: it has too many characters; {MAX_LINE_LENGTH:,} are the most")
    return line


def _not_text(path: Path, place: int, byte: int) -> ValueError:
    """The error for a byte that is not valid in UTF-8 text, with an encoding guessed from that byte."""
    coding = "UTF-16" if place == 0 and byte >= 0xFE else "LATIN1" if byte else ("UTF-16BE", "UTF-16LE")[place % 2]
    return ValueError(
        f"it is not UTF-8 (byte {place}, 0x{byte:02x}); save it as UTF-8, from {coding} or whatever it is written in: "
        f"iconv -f {coding} -t UTF-8 {shlex.quote(str(path))} > {shlex.quote('NEW' + path.suffix)}"
    )


def read_json(data: bytes | str, most: int = MAX_JSON, *, finite: bool = True, unique_keys: bool = False) -> Any:
    """Parse standard JSON: UTF-8, finite numbers, no lone surrogates, and limited nesting.

    With ``finite=False`` NaN and infinity are accepted too, which Python writes for an undefined loss or score. With
    ``unique_keys``, for files that people write, an object may not have a key twice; otherwise the last one counts.

    Raises:
        ValueError: it is not such JSON, or longer than ``most``.
    """
    if len(data) > most:
        raise ValueError(f"its JSON is larger than {most:,} bytes")
    text = data if isinstance(data, str) else data.decode("utf-8-sig")
    try:
        hooks: dict[str, Any] = {"parse_constant": _finite, "parse_float": _finite} if finite else {}
        value = json.loads(text, object_pairs_hook=_unique if unique_keys else None, **hooks)
        if _ESCAPED_SURROGATE.search(text):  # lone surrogates cannot be encoded as UTF-8
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shortened(key)!r} stands twice; keep one")
        found[key] = value
    return found


def is_object(text: str) -> bool:
    """Whether a text is one JSON object."""
    try:
        return text.startswith("{") and isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is not a number in JSON")
    return number


def read_yaml(text: str, loader: Any = SAFE_LOADER, most: int = MAX_YAML, max_values: int = _MAX_VALUES) -> Any:
    """Parse YAML with a safe loader; values count once for every alias, which stops exponential expansion.

    Raises:
        yaml.YAMLError: the text is not YAML or too large, or a mapping has a duplicate key.
    """
    if len(text) > most:
        raise yaml.YAMLError(f"it is larger than {most:,} characters")
    try:
        _check_events(text, loader, max_values)
        parser = loader(text)
        try:
            node = parser.get_single_node()
            if node is None:
                return None
            sizes: dict[yaml.Node, int] = {}
            _count(node, sizes, 0, max_values)
            stages = {value for key, value in _pairs(node) if key.value == "stages"}
            for inner in sizes:
                _check_keys(inner, parser, "give it a list" if inner in stages else "keep one")
            return parser.construct_document(node)
        finally:
            parser.dispose()
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, OverflowError, RecursionError) as error:
        raise yaml.YAMLError(f"a value in it cannot be read: {str(error)[:200] or type(error).__name__}") from None


def _check_events(text: str, loader: Any, max_values: int) -> None:
    """Check depth and number of values by the events of the parser, which builds no objects and does not recurse."""
    depth = total = 0
    for event in yaml.parse(text, Loader=loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        total += isinstance(event, yaml.NodeEvent)
        if depth > _DEEPEST:
            raise yaml.YAMLError("it is nested too deeply")
        if total > max_values:
            raise _too_many(max_values)


def _too_many(max_values: int) -> yaml.YAMLError:
    return yaml.YAMLError(f"it has more than {max_values:,} values")


def _count(node: yaml.Node, sizes: dict[yaml.Node, int], before: int, max_values: int) -> int:
    """The number of values in a node, aliases expanded."""
    if node in sizes:
        total = sizes[node]
        if not total:
            raise yaml.YAMLError("it contains itself")
    else:
        sizes[node] = 0
        total = 1
        if isinstance(node, yaml.ScalarNode):
            node.value.encode()  # fails on lone surrogates, which cannot be written
        else:
            parts = (
                node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
            )
            for part in parts:
                total += _count(part, sizes, before + total, max_values)
        sizes[node] = total
    if before + total > max_values:
        raise _too_many(max_values)
    return total


def _check_keys(node: yaml.Node, parser: Any, advice: str) -> None:
    """Check that a mapping has no duplicate key, of which only the last would be read."""
    lines: dict[Any, int] = {}
    for key, _ in _pairs(node):
        if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":  # all merge keys are read
            continue
        name = (
            key.value if key.tag == "tag:yaml.org,2002:value" else parser.construct_object(key)
        )  # 1 and 0x1 are equal
        line = key.start_mark.line + 1
        if name in lines:
            raise yaml.YAMLError(f"{shortened(key.value)!r} stands twice, in lines {lines[name]} and {line}; {advice}")
        lines[name] = line


def _pairs(node: yaml.Node) -> list[tuple[yaml.Node, yaml.Node]]:
    return node.value if isinstance(node, yaml.MappingNode) else []


def shortened(text: str, most: int = 200) -> str:
    """The first ``most`` characters of a text, followed by dots if it is longer; keeps messages short."""
    return text if len(text) <= most else f"{text[:most]}..."


def visible(text: str) -> str:
    """Text with control characters and line ends replaced by spaces, of the same length, so that indices stay valid."""
    return text if text.isprintable() else text.translate(_CONTROL)
