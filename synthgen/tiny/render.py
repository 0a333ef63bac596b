"""Render the 3D models of ``models.json`` as training objects of the tiny model: a z-buffer rasterizer in numpy."""

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from synthgen.tiny.mesh import Floats, Ints, Mesh, normalize, read_model

__all__ = ["VIEWS", "render", "render_views"]

VIEWS: tuple[tuple[float, float, bool], ...] = (  # azimuth and elevation in degrees, and whether held out
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
FLAT_ELEVATION = 35.0  # degrees added to the elevation of these
SUPERSAMPLE = 3  # samples per pixel along either axis
MARGIN = 0.02  # of the frame, on every side
DISTANCE = 3.5  # of the camera from the centre, in radii of the model
LIGHT = (-0.40, 0.62, 0.67)  # direction towards the light; x right, y up, z towards the camera
AMBIENT, DIRECT = 0.66, 0.48  # intensities
BLACK = 0.16  # the darkest surface colour, so that black objects keep visible shading
MIN_OPACITY = 0.6  # of translucent surfaces, such as glass
INVISIBLE = 0.02  # surfaces up to this opacity are left out


def render_views(archives: Path, model: str, *, size: int) -> list[tuple[NDArray[np.uint8], bool]]:
    """Render ``model``, "archive stem/model id", from all VIEWS: premultiplied RGBA (size, size, 4), and if held out.

    Raises:
        ValueError: as for :func:`synthgen.tiny.mesh.read_model`, or nothing of the model is visible.
    """
    mesh = read_model(archives, model)
    extra = FLAT_ELEVATION if model in FLAT else 0
    return [(render(mesh, azimuth, elevation + extra, size=size), held_out) for azimuth, elevation, held_out in VIEWS]


def render(mesh: Mesh, azimuth: float, elevation: float, *, size: int) -> NDArray[np.uint8]:
    """Render a mesh from ``azimuth`` degrees right of its front and ``elevation`` degrees above: (size, size, 4).

    Colour is premultiplied by alpha. The model is centred, and its longer side fills the image but for a margin.
    """
    side = size * SUPERSAMPLE
    rotation = view_rotation(azimuth, elevation)
    visible = np.array([material.opacity > INVISIBLE for material in mesh.materials])[mesh.material]
    if not visible.any():
        raise ValueError("nothing of the model is visible")
    vertices, normals = mesh.vertices[visible] @ rotation.T, mesh.normals[visible] @ rotation.T
    uv, material = mesh.uv[visible], mesh.material[visible]
    vertices = place_camera(vertices)
    xy, inverse_depth = project(vertices, side)
    light = shade(vertices, normals)

    triangle, pixel, weights = rasterize(xy)
    weights *= inverse_depth[triangle]  # perspective-correct interpolation
    fragment_inverse_depth = weights.sum(axis=1)
    weights /= fragment_inverse_depth[:, None]
    colour = np.empty((len(triangle), 4))
    for number, surface in enumerate(mesh.materials):
        at = np.flatnonzero(material[triangle] == number)
        colour[at] = (*surface.colour, 1.0)
        if surface.texture is not None and len(at):
            colour[at] = sample_texture(surface.texture, np.einsum("nk,nkd->nd", weights[at], uv[triangle[at]]))
        opacity = 1 if surface.opacity > 0.99 else max(surface.opacity, MIN_OPACITY)
        colour[at, 3] = np.where(colour[at, 3] < 0.5, 0, opacity)
    colour[:, :3] = BLACK + (1 - BLACK) * colour[:, :3]
    colour[:, :3] *= np.einsum("nk,nk->n", weights, light[triangle])[:, None]
    image = composite(pixel, fragment_inverse_depth, colour.clip(0, 1), side)
    image = image.reshape(size, SUPERSAMPLE, size, SUPERSAMPLE, 4).mean(axis=(1, 3))
    rgba: NDArray[np.uint8] = (image * 255).round().astype(np.uint8)
    return rgba


def view_rotation(azimuth: float, elevation: float) -> Floats:
    """The rotation from the model's axes to the camera's: x right, y up, z towards the camera."""
    a, e = math.radians(azimuth), math.radians(elevation)
    yaw = np.array([[math.cos(a), 0, -math.sin(a)], [0, 1, 0], [math.sin(a), 0, math.cos(a)]])
    pitch = np.array([[1, 0, 0], [0, math.cos(e), -math.sin(e)], [0, math.sin(e), math.cos(e)]])
    rotation: Floats = pitch @ yaw
    return rotation


def place_camera(vertices: Floats) -> Floats:
    """Scale vertices (t, 3, 3) to radius 1 and move them DISTANCE in front of a camera at the origin."""
    points = vertices.reshape(-1, 3)
    middle = (points.min(axis=0) + points.max(axis=0)) / 2
    radius = float(np.linalg.norm(points - middle, axis=1).max())
    if not 0 < radius < math.inf:
        raise ValueError("the model has no extent")
    placed: Floats = (vertices - middle) / radius
    placed[..., 2] -= DISTANCE
    return placed


def project(vertices: Floats, side: int) -> tuple[Floats, Floats]:
    """Project vertices (t, 3, 3) in camera coordinates to pixels (t, 3, 2), with 1 / depth (t, 3)."""
    inverse_depth: Floats = -1 / vertices[..., 2]
    xy = vertices[..., :2] * inverse_depth[..., None] * (1, -1)
    low, high = xy.min(axis=(0, 1)), xy.max(axis=(0, 1))
    scale = side * (1 - 2 * MARGIN) / float((high - low).max())
    return (xy - (low + high) / 2) * scale + side / 2, inverse_depth


def shade(vertices: Floats, normals: Floats) -> Floats:
    """The light at each vertex, (t, 3): Lambert's law plus ambient light, for both sides of a surface."""
    face = np.cross(vertices[:, 1] - vertices[:, 0], vertices[:, 2] - vertices[:, 0])
    facing = np.where((face * vertices[:, 0]).sum(axis=1) <= 0, 1.0, -1.0)  # the camera is at the origin
    return AMBIENT + DIRECT * (facing[:, None] * (normals @ normalize(np.array(LIGHT)))).clip(0)


def rasterize(xy: Floats) -> tuple[Ints, Ints, Floats]:
    """Find the pixel centres in each triangle: triangle (n,), row and column (n, 2), barycentric weights (n, 3).

    Spans are half open, so a pixel centre on an edge between two triangles belongs to one of them.
    """
    first = np.ceil(xy[..., 1].min(axis=1) - 0.5).astype(np.int64)
    last = np.ceil(xy[..., 1].max(axis=1) - 0.5).astype(np.int64)
    triangle, row = expand_ranges(first, last)
    y = row + 0.5
    left, right = np.full(len(row), np.inf), np.full(len(row), -np.inf)
    for k in range(3):
        ends = xy[:, [k, (k + 1) % 3]]
        order = np.argsort(ends[..., 1], axis=1, kind="stable")
        (x0, y0), (x1, y1) = np.take_along_axis(ends, order[..., None], axis=1)[triangle].transpose(1, 2, 0)
        crossed = (y0 <= y) & (y < y1)
        x = x0 + (x1 - x0) * (y - y0) / np.where(crossed, y1 - y0, 1)
        left, right = np.where(crossed, np.minimum(left, x), left), np.where(crossed, np.maximum(right, x), right)
    nonempty = right > left
    triangle, row = triangle[nonempty], row[nonempty]
    span, column = expand_ranges(*(np.ceil(edge[nonempty] - 0.5).astype(np.int64) for edge in (left, right)))
    triangle, row = triangle[span], row[span]
    a, b, c = xy[triangle].transpose(1, 2, 0)
    p = np.stack([column + 0.5, row + 0.5])
    weights = np.stack([cross(b - p, c - p), cross(c - p, a - p), cross(a - p, b - p)], axis=1)
    weights = (weights * np.sign(cross(b - a, c - a))[:, None]).clip(0)
    total = weights.sum(axis=1)
    inside = total > 0
    pixel = np.stack([row, column], axis=1)[inside]
    return triangle[inside], pixel, weights[inside] / total[inside, None]


def expand_ranges(first: Ints, last: Ints) -> tuple[Ints, Ints]:
    """Concatenate the ranges [first, last): for each number the index of its range, and the number."""
    count = (last - first).clip(0)
    owner = np.repeat(np.arange(len(count)), count)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count) + first[owner]


def cross(a: Floats, b: Floats) -> Floats:
    """The cross product of (2, n) and (2, n)."""
    product: Floats = a[0] * b[1] - a[1] * b[0]
    return product


def sample_texture(texture: NDArray[np.float32], uv: Floats) -> Floats:
    """Bilinear samples of a repeating texture at (n, 2), v upward: (n, 4)."""
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


def composite(position: Ints, inverse_depth: Floats, colour: Floats, side: int) -> Floats:
    """Keep the nearest opaque fragment of each pixel and blend translucent ones in front of it.

    Takes row and column (n, 2), 1 / depth (n,) and straight RGBA (n, 4) of each fragment; returns premultiplied RGBA
    (side, side, 4).
    """
    pixel, opacity = position[:, 0] * side + position[:, 1], colour[:, 3]
    image = np.zeros((side * side, 4))
    front = np.zeros(side * side)  # the z-buffer
    opaque = np.flatnonzero(opacity == 1)
    np.maximum.at(front, pixel[opaque], inverse_depth[opaque])
    nearest = opaque[inverse_depth[opaque] == front[pixel[opaque]]]
    image[pixel[nearest]] = colour[nearest]
    clear = np.flatnonzero((opacity > 0) & (opacity < 1) & (inverse_depth > front[pixel]))
    clear = clear[np.lexsort((inverse_depth[clear], pixel[clear]))]  # by pixel, the farthest first
    _, start, count = np.unique(pixel[clear], return_index=True, return_counts=True)
    layer = np.arange(len(clear)) - np.repeat(start, count)  # of each fragment within its pixel
    for k in range(int(count.max(initial=0))):
        at = clear[layer == k]
        over = colour[at] * opacity[at, None]
        over[:, 3] = opacity[at]
        image[pixel[at]] = over + image[pixel[at]] * (1 - opacity[at, None])
    return image.reshape(side, side, 4)
