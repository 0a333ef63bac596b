"""Draw the 3D models of ``models.json`` as the tiny model's training objects: a z-buffer in numpy.

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

__all__ = ["VIEWS", "Material", "Mesh", "draw", "read_model", "render_views"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

CATALOGUE = "PluginFurnitureCatalog.properties"
VIEWS: tuple[tuple[float, float, bool], ...] = (  # azimuth and elevation in degrees; held out, between training views
    (-66, 14, False),
    (-50, 24, False),
    (-34, 12, False),
    (-23, 17, True),
    (-12, 22, False),
    (8, 12, False),
    (28, 28, False),
    (39, 22, True),
    (50, 16, False),
    (66, 24, False),
)
FLAT = frozenset(  # these lie on the ground and are seen from higher up
    f"BlendSwap-CC-0/{name}"
    for name in [
        "butter",
        "cissors_swap",
        "comb",
        "headphones",
        "mano_cooktop",
        "ruler",
        "slippers",
        "stove",
        "tennisRacket",
    ]
)
LIFT = 35.0  # degrees
SUPERSAMPLE = 3  # samples a pixel, along either axis
MARGIN = 0.02  # of the frame, on every side
DISTANCE = 3.5  # of the camera from the centre, in radii of the model
LIGHT = (-0.40, 0.62, 0.67)  # toward the light; x right, y up, z toward the camera
AMBIENT, DIRECT = 0.66, 0.48
BLACK = 0.16  # the darkest colour a surface has, so that black things keep their shape
GLASS = 0.6  # the least opacity of what is seen at all
INVISIBLE = 0.02  # an opacity up to this is not drawn
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


def render_views(archives: Path, model: str, *, size: int) -> list[tuple[NDArray[np.uint8], bool]]:
    """Draw ``model``, "archive stem/model id", in all of VIEWS: premultiplied RGBA (size, size, 4), and if held out.

    Raises ValueError where the archive, the model or a texture of it cannot be read.
    """
    mesh = read_model(archives, model)
    lift = LIFT if model in FLAT else 0
    return [(draw(mesh, azimuth, elevation + lift, size=size), held_out) for azimuth, elevation, held_out in VIEWS]


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


def draw(mesh: Mesh, azimuth: float, elevation: float, *, size: int) -> NDArray[np.uint8]:
    """Draw a mesh from ``azimuth`` degrees right of its front and ``elevation`` degrees above: (size, size, 4).

    Colour is premultiplied by alpha; the model is centred and fills the square, less a margin, along its longer side.
    """
    side = size * SUPERSAMPLE
    rotation = camera(azimuth, elevation)
    shown = np.array([material.opacity > INVISIBLE for material in mesh.materials])[mesh.material]
    if not shown.any():
        raise ValueError("nothing of the model is visible")
    corners, normals = mesh.corners[shown] @ rotation.T, mesh.normals[shown] @ rotation.T
    uv, material = mesh.uv[shown], mesh.material[shown]
    xy, inverse = project(corners, side)
    light = lighting(corners, normals, inverse)

    triangle, pixel, weights = fragments(xy)
    weights *= inverse[triangle]  # the weights on the surface, not on the screen
    near = weights.sum(axis=1)
    weights /= near[:, None]
    colour = np.empty((len(triangle), 4))
    for place, surface in enumerate(mesh.materials):
        at = np.flatnonzero(material[triangle] == place)
        colour[at] = (*surface.colour, 1.0)
        if surface.texture is not None and len(at):
            colour[at] = sample(surface.texture, np.einsum("nk,nkd->nd", weights[at], uv[triangle[at]]))
        colour[at, 3] = np.where(colour[at, 3] < 0.5, 0, 1 if surface.opacity > 0.99 else max(surface.opacity, GLASS))
    colour[:, :3] = BLACK + (1 - BLACK) * colour[:, :3]
    colour[:, :3] *= np.einsum("nk,nk->n", weights, light[triangle])[:, None]
    image = compose(pixel, near, colour.clip(0, 1), side)
    image = image.reshape(size, SUPERSAMPLE, size, SUPERSAMPLE, 4).mean(axis=(1, 3))
    done: NDArray[np.uint8] = (image * 255).round().astype(np.uint8)
    return done


def camera(azimuth: float, elevation: float) -> Floats:
    """Return the rotation from the model's axes to the camera's: x right, y up, z toward the camera."""
    a, e = math.radians(azimuth), math.radians(elevation)
    yaw = np.array([[math.cos(a), 0, -math.sin(a)], [0, 1, 0], [math.sin(a), 0, math.cos(a)]])
    pitch = np.array([[1, 0, 0], [0, math.cos(e), -math.sin(e)], [0, math.sin(e), math.cos(e)]])
    rotation: Floats = pitch @ yaw
    return rotation


def project(corners: Floats, side: int) -> tuple[Floats, Floats]:
    """Project camera-space ``corners``, (t, 3, 3): to pixels (t, 3, 2), and 1 / depth (t, 3).

    ``corners`` is moved, in place, so that the camera is at 0.
    """
    points = corners.reshape(-1, 3)
    middle = (points.min(axis=0) + points.max(axis=0)) / 2
    radius = float(np.linalg.norm(points - middle, axis=1).max())
    if not 0 < radius < math.inf:
        raise ValueError("the model has no extent")
    corners -= middle
    corners /= radius
    corners[..., 2] -= DISTANCE
    inverse: Floats = -1 / corners[..., 2]
    xy = corners[..., :2] * inverse[..., None] * (1, -1)
    low, high = xy.min(axis=(0, 1)), xy.max(axis=(0, 1))
    scale = side * (1 - 2 * MARGIN) / float((high - low).max())
    return (xy - (low + high) / 2) * scale + side / 2, inverse


def lighting(corners: Floats, normals: Floats, inverse: Floats) -> Floats:
    """Light at the corners, (t, 3): Lambert's plus ambient, both sides of a surface alike."""
    face = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    toward = np.where((face * corners[:, 0]).sum(axis=1) <= 0, 1.0, -1.0)  # the camera is at 0
    direction = unit(np.array(LIGHT))
    return AMBIENT + DIRECT * (toward[:, None] * (normals @ direction)).clip(0)


def fragments(xy: Floats) -> tuple[Ints, Ints, Floats]:
    """Find every pixel centre in every triangle: triangle (n,), row and column (n, 2), weights of its corners (n, 3).

    Spans are half open, so a pixel on the edge between two triangles belongs to one of them.
    """
    first = np.ceil(xy[..., 1].min(axis=1) - 0.5).astype(np.int64)
    last = np.ceil(xy[..., 1].max(axis=1) - 0.5).astype(np.int64)
    triangle, row = spread(first, last)
    y = row + 0.5
    left, right = np.full(len(row), np.inf), np.full(len(row), -np.inf)
    for k in range(3):
        ends = xy[:, [k, (k + 1) % 3]]
        order = np.argsort(ends[..., 1], axis=1, kind="stable")
        (x0, y0), (x1, y1) = np.take_along_axis(ends, order[..., None], axis=1)[triangle].transpose(1, 2, 0)
        crossed = (y0 <= y) & (y < y1)
        x = x0 + (x1 - x0) * (y - y0) / np.where(crossed, y1 - y0, 1)
        left, right = np.where(crossed, np.minimum(left, x), left), np.where(crossed, np.maximum(right, x), right)
    some = right > left
    triangle, row = triangle[some], row[some]
    span, column = spread(*(np.ceil(edge[some] - 0.5).astype(np.int64) for edge in (left, right)))
    triangle, row = triangle[span], row[span]
    a, b, c = xy[triangle].transpose(1, 2, 0)
    p = np.stack([column + 0.5, row + 0.5])
    weights = np.stack([cross(b - p, c - p), cross(c - p, a - p), cross(a - p, b - p)], axis=1)
    weights = (weights * np.sign(cross(b - a, c - a))[:, None]).clip(0)
    total = weights.sum(axis=1)
    some = total > 0
    return triangle[some], np.stack([row, column], axis=1)[some], (weights / np.where(some, total, 1)[:, None])[some]


def spread(first: Ints, last: Ints) -> tuple[Ints, Ints]:
    """Lay the ranges [first, last) end to end: of which range each number is, and the numbers."""
    count = (last - first).clip(0)
    owner = np.repeat(np.arange(len(count)), count)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count) + first[owner]


def cross(a: Floats, b: Floats) -> Floats:
    """Cross product of (2, n) and (2, n)."""
    product: Floats = a[0] * b[1] - a[1] * b[0]
    return product


def sample(texture: NDArray[np.float32], uv: Floats) -> Floats:
    """Look a repeating texture up at (n, 2) places, v upward, between its four nearest texels: (n, 4)."""
    height, width = texture.shape[:2]
    x, y = uv[:, 0] % 1 * width - 0.5, (1 - uv[:, 1]) % 1 * height - 0.5
    left, top = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    fx, fy = (x - left)[:, None], (y - top)[:, None]
    above, below = (
        texture[(top + k) % height, left % width] * (1 - fx) + texture[(top + k) % height, (left + 1) % width] * fx
        for k in range(2)
    )
    mixed: Floats = above * (1 - fy) + below * fy
    return mixed


def compose(place: Ints, near: Floats, colour: Floats, side: int) -> Floats:
    """Keep the nearest opaque fragment of each pixel and lay clearer ones over it: premultiplied (side, side, 4).

    ``place`` is (n, 2), row and column; ``near`` (n,) is larger in front; ``colour`` (n, 4) is not premultiplied.
    """
    pixel, opacity = place[:, 0] * side + place[:, 1], colour[:, 3]
    image = np.zeros((side * side, 4))
    front = np.zeros(side * side)
    solid = np.flatnonzero(opacity == 1)
    np.maximum.at(front, pixel[solid], near[solid])
    seen = solid[near[solid] == front[pixel[solid]]]
    image[pixel[seen]] = colour[seen]
    clear = np.flatnonzero((opacity > 0) & (opacity < 1) & (near > front[pixel]))
    clear = clear[np.lexsort((near[clear], pixel[clear]))]  # of each pixel the furthest first
    new = np.concatenate([[True], np.diff(pixel[clear]) != 0])[: len(clear)]
    start = np.flatnonzero(new)
    layer = np.arange(len(clear)) - start[np.cumsum(new) - 1] if len(clear) else clear
    for k in range(int(layer.max(initial=-1)) + 1):
        at = clear[layer == k]
        over = colour[at] * opacity[at, None]
        over[:, 3] = opacity[at]
        image[pixel[at]] = over + image[pixel[at]] * (1 - opacity[at, None])
    return image.reshape(side, side, 4)
