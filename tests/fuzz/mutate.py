"""Valid inputs made wrong: in their bytes, and in what those bytes mean, with checksums put right again."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np

__all__ = ["MUTATORS", "mutate"]

TOKENS = (
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\r",
    b"\n\n",
    b"[",
    b"]]",
    b"{",
    b"[[[[[[[[" * 40,
    b'{"a":' * 3000,
    b"- " * 400,
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"9" * 5000,
    b"-1",
    b"null",
    b"true",
    b'"\\ud800"',
    b"\\u0000",
    b"../../out",
    b"/etc/out",
    b"C:\\out",
    b"\x1b[2J\x1b]0;x\x07",
    "\u202e\u200b".encode(),
    b"</script><script>",
    b"*a",
    b"&a [*a, *a]",
    b"<<: *a",
    b"!!python/object/apply:os.system [x]",
    b"!!binary '='",
    b"2001-99-99",
    b"'",
    b'"',
    b",,,",
    b";",
    b"a " * 3000,
    b"%s%n{0}{}",
    b"PK\x01\x02",
    b"IDAT",
    b"IHDR\x7f\xff\xff\xff",
    b"\x93NUMPY",
    b"O",
    b"hf_" + b"a" * 30,
    b"\x80\x04\x95",
)
VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2**31,
    2**63,
    10**400,
    1.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\ud800",
    "\x00",
    "../../out",
    "/etc/out",
    "a" * 100_000,
    [],
    {},
    [[]],
    [None],
    ["a"] * 5000,
    [1, 2],
    {"name": 3},
    [[0, 1, 2]],
    {"": ""},
    "<script>",
)


def of_bytes(data: bytes, others: list[bytes], rng: Random) -> bytes:
    """A few cuts, flips and insertions anywhere."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place, span = rng.randrange(len(made) + 1), rng.choice((1, 2, 8, 100, 5000))
        kind = rng.randrange(8)
        if kind == 0 and place < len(made):
            made[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            made[place : place + span] = rng.randbytes(min(span, 100))
        elif kind == 2:
            del made[place : place + span]
        elif kind == 3:
            made[place:place] = rng.choice(TOKENS)
        elif kind == 4:
            made[place:place] = made[place : place + span] * rng.choice((1, 2, 50))
        elif kind == 5:
            made[place:] = rng.choice(others)[rng.randrange(len(data) + 1) :]
        elif kind == 6:
            made[place : place + 4] = struct.pack(
                rng.choice("<>") + "i", rng.choice((-1, 0, 2**31 - 1, -(2**31), 65536))
            )
        else:
            del made[place:]
    return bytes(made)


def of_json(data: bytes, others: list[bytes], rng: Random) -> bytes:
    """One value somewhere in it is another, is gone, or is called otherwise."""
    value = json.loads(data)
    places: list[tuple[Any, Any]] = []

    def walk(part: Any) -> None:
        for key in part if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ():
            places.append((part, key))
            walk(part[key])

    walk(value)
    for _ in range(rng.choice((1, 1, 3))):
        part, key = rng.choice(places)
        try:
            if isinstance(part, dict) and rng.random() < 0.2:
                part[rng.choice(("x", "", "words", "\x00"))] = part.pop(key)
            elif rng.random() < 0.2:
                del part[key]
            else:
                part[key] = rng.choice(VALUES)
        except (KeyError, IndexError):  # another change took it away
            continue
    return json.dumps(value).encode()


def of_lines(data: bytes, others: list[bytes], rng: Random) -> bytes:
    """One line of JSON lines changed as :func:`of_json` does."""
    lines = data.splitlines()
    place = rng.randrange(len(lines))
    lines[place] = of_json(lines[place], others, rng)
    return b"\n".join(lines)


def of_npz(data: bytes, others: list[bytes], rng: Random) -> bytes:
    """An array's header lies, its values are odd, or it is packed otherwise; the archive itself is sound."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(sorted(members))
    array = np.load(io.BytesIO(members[name]), allow_pickle=False)
    kind = rng.randrange(6)
    if kind == 0:
        shape = tuple(rng.choice((0, -1, 1, 3, 2**16, 2**31, 2**62)) for _ in range(rng.randrange(5)))
        members[name] = header(rng.choice(("|u1", "<f2", "<f8", "|O", "<U9", "<M8[s]", "|V8")), shape) + array.tobytes()
    elif kind == 1:
        members[name] = saved(array.astype(rng.choice(("f8", "i8", "?", "U5", "c8"))))
    elif kind == 2:
        members[name] = saved(array[..., None] if rng.random() < 0.5 else array.ravel())
    elif kind == 3:
        members[name] = header("|u1", (2**14, 2**13)) + bytes(2**27)  # a bomb: 130 kB that unpack to 134 MB
    elif kind == 4:
        odd = np.full(array.shape, rng.choice((np.nan, np.inf, -1, 255)))
        with np.errstate(invalid="ignore"):
            members[name] = saved(odd.astype(array.dtype))
    else:
        members[rng.choice(("x.npy", name + ".npy", "../out.npy"))] = members.pop(name)
    buffer = io.BytesIO()
    packing = rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED, zipfile.ZIP_BZIP2))
    packing = zipfile.ZIP_DEFLATED if kind == 3 else packing
    with zipfile.ZipFile(buffer, "w", packing) as archive:
        for member, content in members.items():
            archive.writestr(zipfile.ZipInfo(member), content, packing)
    return buffer.getvalue()


def of_tar(data: bytes, others: list[bytes], rng: Random) -> bytes:
    """A header says something else, its checksum right again; or a member of an odd kind stands between the others."""
    made = bytearray(data)
    if rng.random() < 0.5:
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            start = rng.choice(tar.getmembers()).offset
        field, length = rng.choice(((0, 100), (124, 12), (124, 12), (148, 8), (156, 1), (157, 100), (345, 155)))
        value = rng.choice((b"../../out.png", b"/etc/x.png", b"a\x1b[2J.png", b"\xff\xfe.png", b"\x80" + b"\xff" * 11,
                            b"7" * 11, b"", b"1", b"L", b"x", b"S", b"K", b"g", b"3",
                            b"\xff" * 12, b"00000000001\0"))  # fmt: skip
        made[start + field : start + field + length] = value[:length].ljust(length, b"\0")
        made[start + 148 : start + 156] = b" " * 8
        total = sum(made[start : start + 512])
        made[start + 148 : start + 156] = b"%06o\0 " % total
        return bytes(made)
    info = tarfile.TarInfo(
        rng.choice(("../../out.png", "/tmp/out.png", "a.png", "x/y.json", "\x07.png", "a" * 300 + ".png"))
    )
    info.type = rng.choice(
        (tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE,
         tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_SPARSE)
    )  # fmt: skip
    info.linkname = rng.choice(("", "/etc/passwd", "../../out"))
    body = (
        rng.choice((b"", b"1" * 2000, b"20 path=../../out.a\n", b"19 size=99999999999\n", b"x" * 100))
        if info.type not in b"12345"
        else b""
    )
    info.size = len(body)
    block = info.tobuf(rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))) + body + bytes(-len(body) % 512)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        place = rng.choice(tar.getmembers()).offset
    made[place:place] = block * rng.choice((1, 1, 2, 1500 if info.type in b"xL" else 3))
    return bytes(made)


def of_png(data: bytes, others: list[bytes], rng: Random) -> bytes:
    """A chunk changed, its checksum right again: a size that is a bomb, a palette too short, text without end."""
    chunks, place = [], 8
    while place + 8 <= len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        chunks.append((data[place + 4 : place + 8], bytearray(data[place + 8 : place + 8 + length])))
        place += 12 + length
    kind = rng.randrange(4)
    if kind == 0:
        struct.pack_into(">II", chunks[0][1], 0, *(rng.choice((0, 1, 5000, 20_000, 2**16, 2**31 - 1)) for _ in "wh"))
    elif kind == 1:
        chunks[0][1][8:13] = bytes(rng.randrange(17) for _ in range(5))
    elif kind == 2:
        name = rng.choice((b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"PLTE", b"tRNS", b"acTL", b"fcTL", b"gAMA", b"IEND"))
        body = rng.choice(
            (b"", b"k\0\0" + zlib.compress(bytes(2**24)), rng.randbytes(40), b"II*\0" + rng.randbytes(60))
        )
        chunks.insert(rng.randrange(1, len(chunks) + 1), (name, bytearray(body)))
    else:
        chunks = [
            (name, bytearray(of_bytes(bytes(body), others, rng)) if name == b"IDAT" else body) for name, body in chunks
        ]
    return data[:8] + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


def header(descr: str, shape: tuple[int, ...]) -> bytes:
    """The beginning of an npy that says so."""
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def saved(array: np.ndarray) -> bytes:
    """An npy."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


MUTATORS: dict[str, Callable[[bytes, list[bytes], Random], bytes]] = {
    "json": of_json, "jsonl": of_lines, "npz": of_npz, "tar": of_tar, "png": of_png,
}  # fmt: skip


def mutate(data: bytes, others: list[bytes], kind: str, rng: Random) -> bytes:
    """A wrong form of ``data``: half of the time one that only somebody who knows the format would think of."""
    known = MUTATORS.get(kind)
    return (known if known and rng.random() < 0.5 else of_bytes)(data, others, rng)
