import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from synthgen.tiny import mesh, render
from synthgen.tiny.mesh import read_model
from synthgen.tiny.render import render_views

CUBE = """mtllib cube.mtl
v 0 0 0
v 1 0 0
v 1 1 0
v 0 1 0
v 0 0 1
v 1 0 1
v 1 1 1
v 0 1 1
vt 0 0
vt 1 0
vt 1 1
vt 0 1
g front
usemtl front
f 5/1 6/2 7/3 8/4
g rest
usemtl rest
f 1//1 4//1 3//1 2//1
f 1 5 8 4
f 2 3 7 6
f -5 -1 -2 -6
f 1 2 6 5
"""
MTL = "newmtl front\nKd 1 0 0\n{front}\nnewmtl rest\nKd 0 0 1\n"
CATALOGUE = "id=Tests\nid#1=Tests#cube\nmodel#1=/tests/cube/cube.obj\n{extra}"


def write_archive(
    folder: Path, *, obj: str = CUBE, front: str = "", extra: str = "", files: dict[str, bytes] | None = None
) -> Path:
    with zipfile.ZipFile(folder / "Tests.sh3f", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(mesh.CATALOGUE, CATALOGUE.format(extra=extra))
        archive.writestr("tests/cube/cube.obj", obj)
        archive.writestr("tests/cube/cube.mtl", MTL.format(front=front))
        for name, data in (files or {}).items():
            archive.writestr(name, data)
    return folder


def png(rgba: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(rgba.astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


def front(folder: Path, size: int = 40) -> np.ndarray:
    return render.render(read_model(folder, "Tests/cube"), 0, 0, size=size)


def test_a_cube_from_the_front_is_a_filled_centred_square(tmp_path):
    image = front(write_archive(tmp_path), 50)
    alpha = image[..., 3]
    assert image.shape == (50, 50, 4)
    assert (alpha[2:-2, 2:-2] == 255).all()
    assert not alpha[0].any()
    assert not alpha[:, 0].any()
    assert (alpha == alpha[::-1, ::-1]).all()


def test_only_the_nearest_face_is_visible_in_its_colour(tmp_path):
    middle = front(write_archive(tmp_path))[5:-5, 5:-5]
    assert (middle[..., 0] > 150).all()
    assert (middle[..., 2] < 50).all()
    behind = render.render(read_model(tmp_path, "Tests/cube"), 180, 0, size=40)[5:-5, 5:-5]
    assert (behind[..., 2] > 150).all()
    assert (behind[..., 0] < 50).all()


def test_the_camera_moves_right_and_up(tmp_path):
    image = render.render(read_model(write_archive(tmp_path), "Tests/cube"), 45, 30, size=60)
    red, blue = ((image[..., k] > 120) & (image[..., 3] == 255) for k in (0, 2))
    assert np.nonzero(red)[1].mean() < 30 - 5  # the front is now on the left
    assert np.nonzero(blue)[1].mean() > 30
    assert blue[8, 30]  # the top is visible


def test_the_top_is_lighter_than_the_side_that_faces_away_from_the_light(tmp_path):
    image = render.render(read_model(write_archive(tmp_path), "Tests/cube"), 45, 30, size=60)
    assert image[10, 30, 2] > image[40, 45, 2] + 10


def test_alpha_is_the_covered_area(tmp_path):
    triangle = "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n"
    image = front(write_archive(tmp_path, obj=triangle), 200)
    assert image[..., 3].sum() / 255 == pytest.approx((200 * (1 - 2 * render.MARGIN)) ** 2 / 2, rel=0.01)
    assert (image[..., :3] <= image[..., 3:]).all()


def test_a_concave_polygon_is_not_filled(tmp_path):
    notch = "v 0 0 0\nv 3 0 0\nv 3 3 0\nv 2 3 0\nv 2 1 0\nv 1 1 0\nv 1 3 0\nv 0 3 0\nf 1 2 3 4 5 6 7 8\n"
    alpha = front(write_archive(tmp_path, obj=notch), 60)[..., 3]
    assert not alpha[5:35, 25:35].any()
    assert (alpha[5:55, 5:18] == 255).all()
    assert (alpha[5:55, 42:55] == 255).all()
    assert (alpha[45:55, 5:55] == 255).all()


def test_a_texture_is_upright(tmp_path):
    texture = np.zeros((8, 8, 3))
    texture[:4, :4, 1] = 255  # upper left
    image = front(write_archive(tmp_path, front="map_Kd -s 1 1 1 a.png", files={"tests/cube/a.png": png(texture)}))
    green = image[..., 1] > 150
    assert green[6:16, 6:16].all()
    assert not green[24:].any()
    assert not green[:, 24:].any()


def test_transparent_texels_are_holes(tmp_path):
    texture = np.full((8, 8, 4), 255)
    texture[:, 4:, 3] = 0
    image = front(write_archive(tmp_path, front="map_Kd a.png", files={"tests/cube/a.png": png(texture)}))
    assert (image[20, 5:15, :3] > 150).all()
    assert (image[20, 25:32, 2] > 100).all()  # blue, the inside of the back
    assert (image[20, 25:32, 0] < 60).all()


def test_translucent_surfaces_are_blended_and_invisible_ones_left_out(tmp_path):
    glass = front(write_archive(tmp_path, front="d 0.3"))[20, 20]
    assert glass[3] == 255
    assert glass[0] > 100
    assert glass[2] > 60
    assert front(write_archive(tmp_path, front="Tr 1"))[20, 20, 0] < 60


def test_a_surface_with_a_missing_texture_has_its_colour(tmp_path):
    image = front(write_archive(tmp_path, front="map_Kd ../../../../lost.png"))
    assert (image == front(write_archive(tmp_path))).all()


def test_the_rotation_of_the_catalogue_is_applied(tmp_path):
    image = front(write_archive(tmp_path, extra="modelRotation#1=-1 0 0 0 1 0 0 0 -1\n"))
    assert image[20, 20, 2] > 150


def test_views_are_deterministic_and_two_are_held_out(tmp_path):
    write_archive(tmp_path)
    one, two = (render_views(tmp_path, "Tests/cube", size=24) for _ in range(2))
    assert len(one) == len(render.VIEWS)
    assert sum(held_out for _, held_out in one) == 2
    for (a, _), (b, _) in zip(one, two, strict=True):
        assert a.dtype == np.uint8
        assert (a == b).all()
        assert (a[..., :3] <= a[..., 3:]).all()
    angles = [azimuth for azimuth, _, held_out in render.VIEWS if not held_out]
    assert all(min(angles) < azimuth < max(angles) for azimuth, _, held_out in render.VIEWS if held_out)


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        ("", "0 triangles"),
        ("v 0 0 0\nv 1 0 0\nv 1 1 0\nf 1 2 9\n", "face corner"),
        ("v 0 0 0\nv 1 0 0\nv 1 nan 0\nf 1 2 3\n", "expected .* numbers"),
        ("v 0 0 0\nv 1 0\nv 1 1 0\nf 1 2 3\n", "expected .* numbers"),
        ("v 0 0 0\nv 1 0 0\nv 1 1 0\nf 1 2 x\n", "invalid literal"),
        ("v 1 1 1\nf 1 1 1\n", "no extent"),
        ("mtllib lost.mtl\n", r"no tests/cube/lost\.mtl"),
    ],
)
def test_a_bad_model_is_an_error(tmp_path, obj, message):
    with pytest.raises(ValueError, match=message):
        front(write_archive(tmp_path, obj=obj))


def test_a_bad_texture_is_an_error(tmp_path):
    write_archive(tmp_path, front="map_Kd a.png", files={"tests/cube/a.png": b"no picture"})
    with pytest.raises(ValueError, match=r"texture tests/cube/a\.png"):
        front(tmp_path)


def test_a_bad_archive_or_name_is_an_error(tmp_path):
    write_archive(tmp_path)
    for model, message in {
        "Tests/lamp": "not in the catalogue",
        "Lost/cube": r"no Lost\.sh3f",
        "../Tests/cube": "not of the form",
        "cube": "not of the form",
    }.items():
        with pytest.raises(ValueError, match=message):
            read_model(tmp_path, model)
    path = tmp_path / "Tests.sh3f"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="Tests/cube"):
        read_model(tmp_path, "Tests/cube")
    at = whole.index(b"cube.obj") + 40
    path.write_bytes(whole[:at] + bytes(40) + whole[at + 40 :])
    with pytest.raises(ValueError, match="Tests/cube"):
        read_model(tmp_path, "Tests/cube")


def test_every_model_is_listed_once():
    models = json.loads(Path(render.__file__).with_name("models.json").read_text(encoding="utf-8"))
    listed = [model for group in models.values() for model in group]
    assert len(set(listed)) == len(listed)
    assert set(listed) >= render.FLAT
    assert all(models.values())
