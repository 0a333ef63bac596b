"""The 3D models of ``models.json`` as triangles with materials, read from the archives that they come in.

The models come from Debian's ``sweethome3d-furniture``, those whose own licence file says CC0. Each is an OBJ file with
its MTL and textures inside a ``.sh3f`` archive (a zip with a catalogue), and is read from there without unpacking.
y is up, and z comes to the viewer.
"""

import io
import math
import posixpath
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["Floats", "Ints", "Material", "Mesh", "read_model", "unit"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

CATALOGUE = "PluginFurnitureCatalog.properties"
CREASE = 0.8  # cosine up to which a corner's normal may leave its face's
TEXTURE_SIZE = 256  # pixels a side at most; larger ones are reduced, which also keeps them from aliasing
MAX_BYTES, MAX_PIXELS, MAX_TRIANGLES = 64 << 20, 64 << 20, 200_000
MAX_CORNERS = 500  # a polygon with more is taken to be convex


@dataclass(frozen=True)
class Material:
    """A surface: colour in [0, 1], opacity, and where there is one a texture, (h, w, 4) in [0, 1], in place of it."""

    colour: tuple[float, float, float] = (0.8, 0.8, 0.8)
    opacity: float = 1.0
    texture: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Mesh:
    """A model of t triangles."""

    corners: Floats  # t 3 3
    uv: Floats  # t 3 2, v upward
    material: Ints  # t, places in ``materials``
    materials: tuple[Material, ...]
    normals: Floats  # t 3 3, unit


def read_model(archives: Path, model: str) -> Mesh:
    """Read "archive stem/model id" from the ``.sh3f`` archives in a folder, turned as its catalogue says."""
    found = re.fullmatch(r"([\w-]+)/([\w-]+)", model)
    if found is None:
        raise ValueError(f'{model!r} is not "archive stem/model id"')
    stem, name = found.groups()
    try:
        with zipfile.ZipFile(archives / f"{stem}.sh3f") as archive:
            path, rotation = look_up(member(archive, CATALOGUE).decode("latin-1"), name)
            return read_obj(archive, path, rotation)
    except FileNotFoundError as error:
        raise ValueError(f"{model}: no {stem}.sh3f in {archives}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise ValueError(f"{model}: {error}") from error


def look_up(catalogue: str, name: str) -> tuple[str, Floats]:
    """Return the path of a model's OBJ file in its archive, and its rotation, (3, 3)."""
    rows = dict(re.findall(r"^((?:id|model|modelRotation)#\d+)[ \t]*=[ \t]*(.*?)[ \t]*\r?$", catalogue, re.MULTILINE))
    for key, value in rows.items():
        if key.startswith("id#") and value.rpartition("#")[2] == name:
            number = key.removeprefix("id")
            rotation = numbers(rows.get(f"modelRotation{number}", "1 0 0 0 1 0 0 0 1").split(), 9).reshape(3, 3)
            return rows.get(f"model{number}", "").lstrip("/"), rotation
    raise ValueError("not in the catalogue")


def member(archive: zipfile.ZipFile, path: str) -> bytes:
    """Read one file of an archive, if it is there and not too large."""
    try:
        info = archive.getinfo(path)
    except KeyError:
        raise ValueError(f"no {path} in the archive") from None
    if info.file_size > MAX_BYTES:
        raise ValueError(f"{path} has {info.file_size} bytes, more than {MAX_BYTES}")
    return archive.read(info)


def numbers(words: Sequence[str], num: int) -> Floats:
    """Parse the first ``num`` of the words as finite numbers."""
    values = np.array([float(word) for word in words[:num]])
    if len(values) < num or not np.isfinite(values).all():
        raise ValueError(f"{num} numbers expected, not {' '.join(words)[:60]!r}")
    return values


def read_obj(archive: zipfile.ZipFile, path: str, rotation: Floats) -> Mesh:
    """Read an OBJ file and the materials it names; unknown materials are grey."""
    points: list[list[str]] = []
    places: list[list[str]] = []
    polygons: list[list[tuple[int, int]]] = []
    owners: list[int] = []
    known: dict[str, Material] = {}
    used: dict[str, int] = {"": 0}
    current = 0
    for line in member(archive, path).decode("latin-1").splitlines():
        key, _, rest = line.strip().partition(" ")
        if key == "v":
            points.append(rest.split()[:3])
        elif key == "vt":
            places.append([*rest.split(), "0"][:2])
        elif key == "f":
            polygons.append([corner(word, len(points), len(places)) for word in rest.split()])
            owners.append(current)
        elif key == "usemtl":
            current = used.setdefault(rest.strip(), len(used))
        elif key == "mtllib":
            known |= read_mtl(archive, beside(path, rest.strip()))
    xyz = numbers([word for point in points for word in point], 3 * len(points)).reshape(-1, 3) @ rotation.T
    uv = numbers([word for place in places for word in place], 2 * len(places)).reshape(-1, 2)
    pieces = [(triangle, owner) for triangle, owner in triangulate(polygons, owners, xyz)]
    if not 0 < len(pieces) <= MAX_TRIANGLES:
        raise ValueError(f"{len(pieces)} triangles, not 1 to {MAX_TRIANGLES}")
    index = np.array([triangle for triangle, _ in pieces])  # t 3 2
    return Mesh(
        corners=xyz[index[:, :, 0]],
        uv=np.concatenate([uv, np.zeros((1, 2))])[index[:, :, 1]],  # place -1 is none
        material=np.array([owner for _, owner in pieces], dtype=np.int64),
        materials=tuple(known.get(name, Material()) for name in used),
        normals=smooth(xyz, index[:, :, 0]),
    )


def corner(word: str, points: int, places: int) -> tuple[int, int]:
    """Parse "v", "v/vt", "v//vn" or "v/vt/vn" into the places of v and vt from 0, vt -1 where there is none."""
    first, _, rest = word.partition("/")
    second = rest.partition("/")[0]
    v, vt = int(first), int(second or 0)
    v, vt = v - 1 if v > 0 else points + v, vt - 1 if vt >= 0 else places + vt
    if not (0 <= v < points and -1 <= vt < places):
        raise ValueError(f"a face names {word!r}, of {points} points and {places} texture places")
    return v, vt


def triangulate(
    polygons: Sequence[list[tuple[int, int]]], owners: Sequence[int], xyz: Floats
) -> Iterator[tuple[list[tuple[int, int]], int]]:
    """Cut polygons into triangles: convex ones into fans, others ear by ear."""
    for polygon, owner in zip(polygons, owners, strict=True):
        if len(polygon) == 3:
            yield polygon, owner
        elif len(polygon) > 3:
            for a, b, c in ears(xyz[[v for v, _ in polygon]].tolist()):
                yield [polygon[a], polygon[b], polygon[c]], owner


def ears(loop: list[list[float]]) -> Iterator[tuple[int, int, int]]:
    """Cut one polygon, its points in order, into triangles of places in it."""
    normal = [0.0, 0.0, 0.0]
    for (ax, ay, az), (bx, by, bz) in zip(loop, loop[1:] + loop[:1], strict=True):
        normal[0] += (ay - by) * (az + bz)
        normal[1] += (az - bz) * (ax + bx)
        normal[2] += (ax - bx) * (ay + by)
    drop = max(range(3), key=lambda axis: abs(normal[axis]))  # seen along this axis the polygon is largest
    sign = math.copysign(1.0, normal[drop])
    flat = [(sign * p[(drop + 1) % 3], p[(drop + 2) % 3]) for p in loop]

    def turn(a: int, b: int, c: int) -> float:
        (ax, ay), (bx, by), (cx, cy) = flat[a], flat[b], flat[c]
        return (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)

    left = list(range(len(loop)))
    while 3 < len(left) <= MAX_CORNERS:
        triples = [(left[k - 1], left[k], left[(k + 1) % len(left)]) for k in range(len(left))]
        if all(turn(*triple) >= 0 for triple in triples):
            break
        for a, b, c in triples:
            others = (p for p in left if p not in (a, b, c))
            if turn(a, b, c) > 0 and not any(min(turn(a, b, p), turn(b, c, p), turn(c, a, p)) >= 0 for p in others):
                left.remove(b)
                yield a, b, c
                break
        else:  # it crosses itself: whatever is left becomes a fan
            break
    for b, c in pairwise(left[1:]):
        yield left[0], b, c


def smooth(xyz: Floats, index: Ints) -> Floats:
    """Normals (t, 3, 3) at the corners of triangles: of the surface where it is smooth, of the face at its edges."""
    a, b, c = (xyz[index[:, k]] for k in range(3))
    area = np.cross(b - a, c - a)
    mean: Floats = np.stack([np.bincount(index.ravel(), np.repeat(area[:, k], 3), len(xyz)) for k in range(3)], axis=1)
    face, corners = unit(area)[:, None], unit(mean)[index]
    return np.where((corners * face).sum(axis=2, keepdims=True) > CREASE, corners, face)


def unit(vectors: Floats) -> Floats:
    """Scale to length 1; what has none stays 0."""
    length: Floats = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.maximum(length, 1e-30)


def beside(path: str, name: str) -> str:
    """Return the path, inside the archive, of a file that the file ``path`` names."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), name.replace("\\", "/")))


def read_mtl(archive: zipfile.ZipFile, path: str) -> dict[str, Material]:
    """Read a material library: Kd, d or Tr, and map_Kd. A texture that is not there leaves the colour."""
    out: dict[str, Material] = {}
    colour, opacity = Material.colour, Material.opacity
    texture: NDArray[np.float32] | None = None
    name: str | None = None
    files = set(archive.namelist())
    for line in [*member(archive, path).decode("latin-1").splitlines(), "newmtl"]:
        key, _, rest = line.strip().partition(" ")
        if key == "newmtl":
            if name is not None:
                out[name] = Material(colour, opacity, texture)
            name, colour, opacity, texture = rest.strip(), Material.colour, Material.opacity, None
        elif key == "Kd":
            red, green, blue = numbers(rest.split(), 3).clip(0, 1).tolist()
            colour = (red, green, blue)
        elif key in ("d", "Tr"):
            value = float(numbers(rest.replace("-halo", "").split(), 1)[0].clip(0, 1))
            opacity = value if key == "d" else 1 - value
        elif key == "map_Kd":
            options = (beside(path, rest.strip()), beside(path, rest.split()[-1] if rest.strip() else ""))
            image = next((option for option in options if option in files), None)
            texture = None if image is None else read_texture(member(archive, image), image)
    return out


def read_texture(data: bytes, name: str) -> NDArray[np.float32]:
    """Decode a PNG or JPEG texture, (h, w, 4) in [0, 1]."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} × {image.height} pixels are too many")
            rgba = image.convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"texture {name}: {error}") from error
    rgba.thumbnail((TEXTURE_SIZE, TEXTURE_SIZE))
    return np.asarray(rgba).astype(np.float32) / np.float32(255)
