"""Fetch the open data that the tiny model is trained on, and prepare it once: ``python -m synthgen.tiny.fetch``.

Objects come from ``@lobehub/fluent-emoji-3d`` (MIT, art by Microsoft) and from the 3D models of Debian's
``sweethome3d-furniture`` (``models.json``), scenes from the HDR panoramas of ``@pmndrs/assets`` (CC0).
``emojibase-data`` (MIT) names the emoji; ``objects.json`` was chosen from its names, and here it only checks that every
chosen file is what its name says it is.
"""

import argparse
import base64
import json
import logging
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file, save_file
from scipy.ndimage import grey_closing

from synthgen.tiny.paint import COLOURS, paint
from synthgen.tiny.render import render_views

__all__ = ["DEBIAN", "PACKAGES", "fetch", "prepare_objects", "prepare_panoramas"]

log = logging.getLogger(__name__)

PACKAGES: dict[str, str] = {
    "@lobehub/fluent-emoji-3d": "1.1.0",
    "emojibase-data": "17.0.0",
    "@pmndrs/assets": "1.7.0",
}
DEBIAN = ("sweethome3d-furniture", "1.8-1")
ARCHIVES = Path("usr/share/sweethome3d/furniture")  # in the Debian package
OBJECT_SIZE = 96  # pixels a side of a prepared object
OBJECTS = Path(__file__).with_name("objects.json")
MODELS = Path(__file__).with_name("models.json")

Row = tuple[NDArray[np.uint8], int, int, bool]  # premultiplied RGBA, place of the object and of the colour, held out


class FetchError(Exception):
    """The data could not be fetched or is not what it should be; the message says what to do."""


def fetch(data: Path) -> None:
    """Leave ``objects.safetensors`` and ``panoramas.safetensors`` in the folder ``data``.

    Packages that already lie there as ``.tgz`` files (named as ``npm pack`` names them) or as ``.deb`` are not fetched
    again. Raises FetchError where npm, apt-get or dpkg-deb is missing or fails.
    """
    data.mkdir(parents=True, exist_ok=True)
    emoji, names, assets = (unpack(data, name, version) for name, version in PACKAGES.items())
    archives = unpack_debian(data, *DEBIAN) / ARCHIVES
    prepare_panoramas(assets / "hdri", data / "panoramas.safetensors")
    views = data / f"views-{OBJECT_SIZE}"
    prepare_objects(emoji / "assets", names / "en" / "data.json", archives, views, data / "objects.safetensors")


def unpack(data: Path, name: str, version: str) -> Path:
    """Return the unpacked folder of one npm package, fetching and unpacking what is not there."""
    stem = f"{name.removeprefix('@').replace('/', '-')}-{version}"
    folder, archive = data / stem, data / f"{stem}.tgz"
    if not (folder / "package").is_dir():
        if not archive.is_file():
            npm_pack(data, name, version)
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        log.info("unpacked %s", archive.name)
    return folder / "package"


def npm_pack(data: Path, name: str, version: str) -> None:
    """Fetch one package as a ``.tgz`` into ``data``."""
    npm = shutil.which("npm")
    if npm is None:
        raise FetchError(f"npm is not on the path: install Node.js, or put the .tgz of {name}@{version} into {data}")
    done = subprocess.run([npm, "pack", f"{name}@{version}"], cwd=data, capture_output=True, text=True, check=False)
    if done.returncode:
        raise FetchError(f"npm pack {name}@{version} failed: {(done.stderr.strip().splitlines() or ['no message'])[0]}")


def unpack_debian(data: Path, name: str, version: str) -> Path:
    """Return the unpacked folder of one Debian package, fetching and unpacking what is not there."""
    folder = data / f"{name}-{version}"
    if not folder.is_dir():
        if not any(data.glob(f"{name}_*.deb")):
            debian_tool(data, name, version, "apt-get", "download", f"{name}={version}")
        archive = max(data.glob(f"{name}_*.deb")).resolve()
        part = folder.with_name(f"{folder.name}.part")
        debian_tool(data, name, version, "dpkg-deb", "-x", str(archive), str(part.resolve()))
        part.replace(folder)
        log.info("unpacked %s", archive.name)
    return folder


def debian_tool(data: Path, name: str, version: str, tool: str, *arguments: str) -> None:
    """Run one of Debian's tools in ``data``."""
    where = f"unpack the .deb of {name} {version} (from any Debian mirror) into {data / f'{name}-{version}'}"
    path = shutil.which(tool)
    if path is None:
        raise FetchError(f"{tool} is not on the path: {where}")
    done = subprocess.run([path, *arguments], cwd=data, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise FetchError(f"{tool} {arguments[0]} failed: {lines[-1]}; or {where}")


def prepare_objects(assets: Path, names: Path, archives: Path, views: Path, out: Path) -> None:
    """Write every drawing of every object as one file: emoji, as they are and painted, then views of 3D models.

    ``rgba`` is uint8 (n, 96, 96, 4), its colour premultiplied by alpha; ``object`` int64 (n,) is the place of its name
    among those of objects.json and then the new ones of models.json; ``colour`` int64 (n,) its place in COLOURS, -1
    where it was not painted; ``held_out`` bool (n,) marks views to keep from training. Raises FetchError when a chosen
    code point is not in the emojibase list.
    """
    objects = json.loads(OBJECTS.read_text(encoding="utf-8"))
    models = json.loads(MODELS.read_text(encoding="utf-8"))
    place = {name: k for k, name in enumerate(dict.fromkeys([*objects, *models]))}
    rows = [*emoji_rows(objects, place, assets, names), *model_rows(models, place, archives, views)]
    images, owners, colours, held_out = zip(*rows, strict=True)
    columns = {
        "rgba": np.stack(images),
        "object": np.array(owners, dtype=np.int64),
        "colour": np.array(colours, dtype=np.int64),
        "held_out": np.array(held_out, dtype=np.bool_),
    }
    save(columns, out)
    log.info("%d images of %d objects: %s", len(images), len(place), out.name)


def emoji_rows(objects: dict[str, Any], place: dict[str, int], assets: Path, names: Path) -> Iterator[Row]:
    """Crop each chosen emoji to its alpha and fit it into a square; each colour of the paintable ones follows it."""
    known = {plain(row["hexcode"]) for row in json.loads(names.read_text(encoding="utf-8"))}
    for name, entry in objects.items():
        for code in entry["emoji"]:
            if plain(code) not in known and plain(code).split("-")[0] not in known:
                raise FetchError(f"objects.json: {name}: {code} is no emoji of emojibase-data")
            file = assets / f"{code}.webp"
            if not file.is_file():
                raise FetchError(f"objects.json: {name}: there is no drawing {file}")
            image = fit(Image.open(file))
            yield image, place[name], -1, False
            if entry.get("paint", False):
                hue = entry.get("hue", {}).get(code)
                for k, colour in enumerate(COLOURS):
                    yield paint(image, colour, hue=hue), place[name], k, False


def model_rows(models: dict[str, list[str]], place: dict[str, int], archives: Path, views: Path) -> Iterator[Row]:
    """Draw every view of every 3D model.

    A model's views are kept as a file in the folder ``views`` and not drawn again; remove it to draw them anew.
    """
    views.mkdir(parents=True, exist_ok=True)
    for k, (name, ids) in enumerate(models.items(), start=1):
        for model in ids:
            file = views / f"{quote(model, safe='')}.safetensors"
            if not file.is_file():
                images, held_out = zip(*render_views(archives, model, size=OBJECT_SIZE), strict=True)
                save({"rgba": np.stack(images), "held_out": np.array(held_out, dtype=np.bool_)}, file)
            kept = load_file(file)
            for image, back in zip(kept["rgba"], kept["held_out"].tolist(), strict=True):
                yield image, place[name], -1, back
        log.info("3D models: %s, %d of %d objects", name, k, len(models))


def save(columns: dict[str, NDArray[Any]], out: Path) -> None:
    """Write a safetensors file that is there whole or not at all."""
    part = out.with_name(f"{out.name}.part")
    save_file(columns, part)
    part.replace(out)


def plain(code: str) -> str:
    """Return a hexcode as the file names spell it, without the variation selector."""
    return code.lower().replace("-fe0f", "")


def fit(image: Image.Image) -> NDArray[np.uint8]:
    """Centre what is opaque in a square of OBJECT_SIZE, longest side filled; colour premultiplied by alpha."""
    image = image.convert("RGBA")
    box = image.getchannel("A").point([255 * (level > 8) for level in range(256)]).getbbox()
    image = image.crop(box).convert("RGBa")
    scale = OBJECT_SIZE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    small = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))
    out = np.zeros((OBJECT_SIZE, OBJECT_SIZE, 4), dtype=np.uint8)
    top, left = (OBJECT_SIZE - height) // 2, (OBJECT_SIZE - width) // 2
    out[top : top + height, left : left + width] = np.minimum(small, small[..., 3:])
    return out


def prepare_panoramas(hdri: Path, out: Path) -> None:
    """Tone-map every panorama and write them as one file: name → uint8 (256, 512, 3), equirectangular."""
    save_file({path.name.split(".")[0]: tone_map(read_exr(path)) for path in sorted(hdri.glob("*.exr.js"))}, out)
    log.info("panoramas: %s", out.name)


def read_exr(path: Path) -> NDArray[np.float32]:
    """Return the linear light, (H, W, 3), of an EXR file kept as a base64 data URI in a JavaScript module."""
    try:
        import OpenEXR
    except ImportError as error:
        raise FetchError("reading the panoramas needs OpenEXR: pip install OpenEXR") from error
    text = path.read_text(encoding="ascii")
    exr = path.with_suffix("")  # beside the module, without .js
    exr.write_bytes(base64.b64decode(text[text.index("base64,") + len("base64,") : text.rindex("'")]))
    with OpenEXR.File(str(exr)) as file:
        light = np.array(file.channels()["RGB"].pixels, dtype=np.float32)
    light = np.nan_to_num(light, nan=0, posinf=6e4).clip(min=0)
    holes = (light <= 0).any(axis=2, keepdims=True)  # the codec rings below zero beside lamps and the sun
    return np.where(holes, grey_closing(light, size=(7, 7, 1), mode="nearest"), light)


def tone_map(light: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Map linear light to sRGB bytes: x (1 + x / 9) / (1 + x), x scaled so that the log-mean luminance is 0.23."""
    luminance = light @ np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)
    x = light * (0.23 / np.exp(np.log(luminance + 1e-4).mean()))
    x = (x * (1 + x / 9) / (1 + x)).clip(0, 1)
    mapped: NDArray[np.uint8] = (x ** (1 / 2.2) * 255).round().astype(np.uint8)
    return mapped


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m synthgen.tiny.fetch", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder for the packages and the prepared files")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        fetch(parser.parse_args().data)
    except FetchError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
