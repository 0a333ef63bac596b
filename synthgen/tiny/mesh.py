"""Read the 3D models of ``models.json`` as textured triangles.

They come from Debian's ``sweethome3d-furniture``; all are CC0 by their own licence files. Each is an OBJ file with its
MTL file and textures inside a ``.sh3f`` archive (a zip file with a catalogue), and is read without unpacking the
archive. y is up, and z points towards the viewer.
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

__all__ = ["Floats", "Ints", "Material", "Mesh", "normalize", "read_model"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

CATALOGUE = "PluginFurnitureCatalog.properties"
MIN_CREASE_COSINE = 0.8  # between a face and its smoothed normal; a sharper edge is shaded flat
TEXTURE_SIZE = 256  # pixels a side at most; reducing larger textures also prevents aliasing
MAX_BYTES, MAX_PIXELS, MAX_TRIANGLES = 64 << 20, 64 << 20, 200_000
MAX_CORNERS = 500  # of a polygon for ear clipping; a larger one is treated as convex


@dataclass(frozen=True)
class Material:
    """A surface: colour and opacity in [0, 1], and an optional texture (h, w, 4) that replaces the colour."""

    colour: tuple[float, float, float] = (0.8, 0.8, 0.8)
    opacity: float = 1.0
    texture: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Mesh:
    """A model of t triangles."""

    vertices: Floats  # t 3 3, the corners of each triangle
    uv: Floats  # t 3 2, v upward
    material: Ints  # t, index into ``materials``
    materials: tuple[Material, ...]
    normals: Floats  # t 3 3, unit length


def read_model(archives: Path, model: str) -> Mesh:
    """Read "archive stem/model id" from the ``.sh3f`` archives in a folder, rotated as the catalogue says.

    Raises:
        ValueError: the archive, the model or one of its files is missing, damaged or too large.
    """
    match = re.fullmatch(r"([\w-]+)/([\w-]+)", model)
    if match is None:
        raise ValueError(f'{model!r} is not of the form "archive stem/model id"')
    stem, name = match.groups()
    try:
        with zipfile.ZipFile(archives / f"{stem}.sh3f") as archive:
            path, rotation = find_model(read_file(archive, CATALOGUE).decode("latin-1"), name)
            return read_obj(archive, path, rotation)
    except FileNotFoundError as error:
        raise ValueError(f"{model}: no {stem}.sh3f in {archives}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise ValueError(f"{model}: {error}") from error


def find_model(catalogue: str, name: str) -> tuple[str, Floats]:
    """The path of a model's OBJ file in its archive, and the model's rotation, (3, 3)."""
    rows = dict(re.findall(r"^((?:id|model|modelRotation)#\d+)[ \t]*=[ \t]*(.*?)[ \t]*\r?$", catalogue, re.MULTILINE))
    for key, value in rows.items():
        if key.startswith("id#") and value.rpartition("#")[2] == name:
            number = key.removeprefix("id")
            rotation = parse_floats(rows.get(f"modelRotation{number}", "1 0 0 0 1 0 0 0 1").split(), 9).reshape(3, 3)
            return rows.get(f"model{number}", "").lstrip("/"), rotation
    raise ValueError("not in the catalogue")


def read_file(archive: zipfile.ZipFile, path: str) -> bytes:
    """Read a file of an archive, unless it is missing or too large."""
    try:
        info = archive.getinfo(path)
    except KeyError:
        raise ValueError(f"no {path} in the archive") from None
    if info.file_size > MAX_BYTES:
        raise ValueError(f"{path} has {info.file_size} bytes; at most {MAX_BYTES} are read")
    return archive.read(info)


def parse_floats(words: Sequence[str], num: int) -> Floats:
    """Parse the first ``num`` words as finite numbers."""
    values = np.array([float(word) for word in words[:num]])
    if len(values) < num or not np.isfinite(values).all():
        raise ValueError(f"expected {num} numbers, not {' '.join(words)[:60]!r}")
    return values


# -- geometry


def read_obj(archive: zipfile.ZipFile, path: str, rotation: Floats) -> Mesh:
    """Read an OBJ file and its materials; a missing material is grey."""
    positions: list[list[str]] = []
    texcoords: list[list[str]] = []
    faces: list[list[tuple[int, int]]] = []
    face_materials: list[int] = []
    library: dict[str, Material] = {}
    names: dict[str, int] = {"": 0}
    current = 0
    for line in read_file(archive, path).decode("latin-1").splitlines():
        key, _, rest = line.strip().partition(" ")
        if key == "v":
            positions.append(rest.split()[:3])
        elif key == "vt":
            texcoords.append([*rest.split(), "0"][:2])
        elif key == "f":
            faces.append([parse_corner(word, len(positions), len(texcoords)) for word in rest.split()])
            face_materials.append(current)
        elif key == "usemtl":
            current = names.setdefault(rest.strip(), len(names))
        elif key == "mtllib":
            library |= read_mtl(archive, resolve(path, rest.strip()))
    xyz = parse_floats([word for row in positions for word in row], 3 * len(positions)).reshape(-1, 3) @ rotation.T
    uv = parse_floats([word for row in texcoords for word in row], 2 * len(texcoords)).reshape(-1, 2)
    triangles, material = [], []
    for face, number in zip(faces, face_materials, strict=True):
        for corners in triangulate(xyz[[v for v, _ in face]].tolist()):
            triangles.append([face[k] for k in corners])
            material.append(number)
    if not 0 < len(triangles) <= MAX_TRIANGLES:
        raise ValueError(f"{len(triangles)} triangles, not 1 to {MAX_TRIANGLES}")
    index = np.array(triangles)  # t 3 2
    return Mesh(
        vertices=xyz[index[:, :, 0]],
        uv=np.concatenate([uv, np.zeros((1, 2))])[index[:, :, 1]],  # -1 stands for none
        material=np.array(material, dtype=np.int64),
        materials=tuple(library.get(name, Material()) for name in names),
        normals=smooth_normals(xyz, index[:, :, 0]),
    )


def parse_corner(word: str, num_positions: int, num_texcoords: int) -> tuple[int, int]:
    """Parse "v", "v/vt", "v//vn" or "v/vt/vn" into the indices of v and vt, from 0; vt is -1 if there is none."""
    first, _, rest = word.partition("/")
    second = rest.partition("/")[0]
    v, vt = int(first), int(second or 0)
    v, vt = v - 1 if v > 0 else num_positions + v, vt - 1 if vt >= 0 else num_texcoords + vt
    if not (0 <= v < num_positions and -1 <= vt < num_texcoords):
        raise ValueError(f"face corner {word!r} is out of range: {num_positions} vertices, {num_texcoords} texcoords")
    return v, vt


def triangulate(polygon: list[list[float]]) -> Iterator[tuple[int, int, int]]:
    """Cut a polygon, its points in order, into triangles of indices: a convex one as a fan, others by ear clipping."""
    if len(polygon) < 3:
        return
    normal = [0.0, 0.0, 0.0]
    for (ax, ay, az), (bx, by, bz) in zip(polygon, polygon[1:] + polygon[:1], strict=True):
        normal[0] += (ay - by) * (az + bz)
        normal[1] += (az - bz) * (ax + bx)
        normal[2] += (ax - bx) * (ay + by)
    drop = max(range(3), key=lambda axis: abs(normal[axis]))  # project along the axis with the largest area
    sign = math.copysign(1.0, normal[drop])
    flat = [(sign * p[(drop + 1) % 3], p[(drop + 2) % 3]) for p in polygon]

    def turn(a: int, b: int, c: int) -> float:
        (ax, ay), (bx, by), (cx, cy) = flat[a], flat[b], flat[c]
        return (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)

    left = list(range(len(polygon)))
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
        else:  # it intersects itself: the rest becomes a fan
            break
    for b, c in pairwise(left[1:]):
        yield left[0], b, c


def smooth_normals(xyz: Floats, index: Ints) -> Floats:
    """Normals (t, 3, 3) at the corners of triangles: averaged over adjacent faces, except at sharp edges."""
    a, b, c = (xyz[index[:, k]] for k in range(3))
    area = np.cross(b - a, c - a)
    mean: Floats = np.stack([np.bincount(index.ravel(), np.repeat(area[:, k], 3), len(xyz)) for k in range(3)], axis=1)
    face, smooth = normalize(area)[:, None], normalize(mean)[index]
    return np.where((smooth * face).sum(axis=2, keepdims=True) > MIN_CREASE_COSINE, smooth, face)


def normalize(vectors: Floats) -> Floats:
    """Scale vectors to unit length; zero vectors stay zero."""
    length: Floats = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.maximum(length, 1e-30)


# -- materials


def resolve(path: str, name: str) -> str:
    """The path, inside the archive, of a file that the file ``path`` refers to as ``name``."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), name.replace("\\", "/")))


def read_mtl(archive: zipfile.ZipFile, path: str) -> dict[str, Material]:
    """Read a material library: Kd, d or Tr, and map_Kd. If a texture is missing, the colour is used."""
    materials: dict[str, Material] = {}
    colour, opacity = Material.colour, Material.opacity
    texture: NDArray[np.float32] | None = None
    name: str | None = None
    files = set(archive.namelist())
    for line in [*read_file(archive, path).decode("latin-1").splitlines(), "newmtl"]:
        key, _, rest = line.strip().partition(" ")
        if key == "newmtl":
            if name is not None:
                materials[name] = Material(colour, opacity, texture)
            name, colour, opacity, texture = rest.strip(), Material.colour, Material.opacity, None
        elif key == "Kd":
            red, green, blue = parse_floats(rest.split(), 3).clip(0, 1).tolist()
            colour = (red, green, blue)
        elif key in ("d", "Tr"):
            value = float(parse_floats(rest.replace("-halo", "").split(), 1)[0].clip(0, 1))
            opacity = value if key == "d" else 1 - value
        elif key == "map_Kd":  # the name may contain spaces, or follow options
            candidates = (resolve(path, rest.strip()), resolve(path, rest.split()[-1] if rest.strip() else ""))
            image = next((candidate for candidate in candidates if candidate in files), None)
            texture = None if image is None else read_texture(read_file(archive, image), image)
    return materials


def read_texture(data: bytes, name: str) -> NDArray[np.float32]:
    """Decode a PNG or JPEG texture, (h, w, 4) in [0, 1]."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} × {image.height} pixels; at most {MAX_PIXELS} are read")
            rgba = image.convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"texture {name}: {error}") from error
    rgba.thumbnail((TEXTURE_SIZE, TEXTURE_SIZE))
    return np.asarray(rgba).astype(np.float32) / np.float32(255)
