"""Draw the 3D models of ``models.json`` as the tiny model's training objects: a z-buffer in numpy."""

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from synthgen.tiny.mesh import Floats, Ints, Mesh, read_model, unit

__all__ = ["VIEWS", "draw", "render_views"]

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


def render_views(archives: Path, model: str, *, size: int) -> list[tuple[NDArray[np.uint8], bool]]:
    """Draw ``model``, "archive stem/model id", in all of VIEWS: premultiplied RGBA (size, size, 4), and if held out.

    Raises ValueError where the archive, the model or a texture of it cannot be read.
    """
    mesh = read_model(archives, model)
    lift = LIFT if model in FLAT else 0
    return [(draw(mesh, azimuth, elevation + lift, size=size), held_out) for azimuth, elevation, held_out in VIEWS]


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
    light = lighting(corners, normals)

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


def lighting(corners: Floats, normals: Floats) -> Floats:
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
