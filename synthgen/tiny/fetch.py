"""Download and prepare the open data that the tiny model is trained on: ``python -m synthgen.tiny.fetch``.

Objects come from ``@lobehub/fluent-emoji-3d`` (``objects.json``; MIT, art by Microsoft) and from the 3D models of
Debian's ``sweethome3d-furniture`` (``models.json``; CC0), scenes from the HDR panoramas of ``@pmndrs/assets`` (CC0).
``emojibase-data`` (MIT) serves to check that every code in ``objects.json`` is an emoji.
"""

import argparse
import base64
import json
import logging
import shutil
import subprocess
import sys
import tarfile
import zlib
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

Row = tuple[NDArray[np.uint8], int, int, bool]  # premultiplied RGBA, index of object and of colour, held out


class FetchError(Exception):
    """The data could not be downloaded or is not as expected; the message says what to do."""


def fetch(data: Path) -> None:
    """Write ``objects.safetensors`` and ``panoramas.safetensors`` to the folder ``data``.

    Packages that are there already, as ``.tgz`` (with the file names of ``npm pack``) or ``.deb``, are not downloaded.

    Raises:
        FetchError: npm, apt-get or dpkg-deb is missing or fails.
    """
    data.mkdir(parents=True, exist_ok=True)
    emoji, names, assets = (unpack(data, name, version) for name, version in PACKAGES.items())
    archives = unpack_debian(data, *DEBIAN) / ARCHIVES
    prepare_panoramas(assets / "hdri", data / "panoramas.safetensors")
    views = data / f"views-{OBJECT_SIZE}"
    prepare_objects(emoji / "assets", names / "en" / "data.json", archives, views, data / "objects.safetensors")


def unpack(data: Path, name: str, version: str) -> Path:
    """The unpacked folder of an npm package; downloads and unpacks it if necessary."""
    stem = f"{name.removeprefix('@').replace('/', '-')}-{version}"
    folder, archive = data / stem, data / f"{stem}.tgz"
    if not folder.is_dir():
        if not archive.is_file():
            hint = f"install Node.js, or put the .tgz of {name}@{version} into {data}"
            run_tool(data, hint, "npm", "pack", f"{name}@{version}")
        partial = folder.with_name(f"{folder.name}.part")
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(partial, filter="data")
        except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
            raise FetchError(f"cannot unpack {archive}: {error}; delete it and run this again") from error
        partial.replace(folder)
        log.info("unpacked %s", archive.name)
    return folder / "package"


def unpack_debian(data: Path, name: str, version: str) -> Path:
    """The unpacked folder of a Debian package; downloads and unpacks it if necessary."""
    folder = data / f"{name}-{version}"
    if not folder.is_dir():
        hint = f"unpack the .deb of {name} {version} (from any Debian mirror) into {folder}"
        if not any(data.glob(f"{name}_*.deb")):
            run_tool(data, hint, "apt-get", "download", f"{name}={version}")
        archive = max(data.glob(f"{name}_*.deb")).resolve()
        partial = folder.with_name(f"{folder.name}.part")
        run_tool(data, hint, "dpkg-deb", "-x", str(archive), str(partial.resolve()))
        partial.replace(folder)
        log.info("unpacked %s", archive.name)
    return folder


def run_tool(data: Path, hint: str, tool: str, *arguments: str) -> None:
    """Run a program in the folder ``data``; ``hint`` says what to do without it."""
    path = shutil.which(tool)
    if path is None:
        raise FetchError(f"{tool} is not on the path: {hint}")
    result = subprocess.run([path, *arguments], cwd=data, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["no message"]
        shown = next((line for line in lines if "error" in line.lower()), lines[-1])
        raise FetchError(f"{tool} {arguments[0]} failed: {shown}; or {hint}")


def prepare_objects(assets: Path, names: Path, archives: Path, views: Path, out: Path) -> None:
    """Write all renderings of all objects to one file: emoji, painted emoji, then views of 3D models.

    ``rgba`` is uint8 (n, 96, 96, 4), premultiplied; ``object`` int64 (n,) the index of its name among those of
    objects.json followed by the new ones of models.json; ``colour`` int64 (n,) its index in COLOURS, -1 if not painted;
    ``held_out`` bool (n,) marks views that are not for training.

    Raises:
        FetchError: a code in objects.json is not an emoji, or has no image.
    """
    objects = json.loads(OBJECTS.read_text(encoding="utf-8"))
    models = json.loads(MODELS.read_text(encoding="utf-8"))
    index = {name: k for k, name in enumerate(dict.fromkeys([*objects, *models]))}
    rows = [*emoji_rows(objects, index, assets, names), *model_rows(models, index, archives, views)]
    images, owners, colours, held_out = zip(*rows, strict=True)
    columns = {
        "rgba": np.stack(images),
        "object": np.array(owners, dtype=np.int64),
        "colour": np.array(colours, dtype=np.int64),
        "held_out": np.array(held_out, dtype=np.bool_),
    }
    save(columns, out)
    log.info("%d images of %d objects: %s", len(images), len(index), out.name)


def emoji_rows(objects: dict[str, Any], index: dict[str, int], assets: Path, names: Path) -> Iterator[Row]:
    """Each emoji of ``objects``, followed by its painted versions if it has any."""
    known = {normalize_code(row["hexcode"]) for row in json.loads(names.read_text(encoding="utf-8"))}
    for name, entry in objects.items():
        for code in entry["emoji"]:
            if not known & {normalize_code(code), normalize_code(code).split("-")[0]}:
                raise FetchError(f"objects.json: {name}: {code} is not an emoji of emojibase-data")
            file = assets / f"{code}.webp"
            if not file.is_file():
                raise FetchError(f"objects.json: {name}: there is no image {file}")
            image = crop_to_square(Image.open(file))
            yield image, index[name], -1, False
            if entry.get("paint", False):
                hue = entry.get("hue", {}).get(code)
                for k, colour in enumerate(COLOURS):
                    yield paint(image, colour, hue=hue), index[name], k, False


def model_rows(models: dict[str, list[str]], index: dict[str, int], archives: Path, views: Path) -> Iterator[Row]:
    """Every view of every 3D model.

    A model is rendered once: its views are cached as a file in the folder ``views``; delete it to render them again.
    """
    views.mkdir(parents=True, exist_ok=True)
    for k, (name, ids) in enumerate(models.items(), start=1):
        for model in ids:
            file = views / f"{quote(model, safe='')}.safetensors"
            if not file.is_file():
                images, held_out = zip(*render_views(archives, model, size=OBJECT_SIZE), strict=True)
                save({"rgba": np.stack(images), "held_out": np.array(held_out, dtype=np.bool_)}, file)
            cached = load_file(file)
            for image, is_held_out in zip(cached["rgba"], cached["held_out"].tolist(), strict=True):
                yield image, index[name], -1, is_held_out
        log.info("3D models: %s, %d of %d objects", name, k, len(models))


def save(columns: dict[str, NDArray[Any]], out: Path) -> None:
    """Write a safetensors file, atomically."""
    partial = out.with_name(f"{out.name}.part")
    save_file(columns, partial)
    partial.replace(out)


def normalize_code(code: str) -> str:
    """A code as in the file names: lower case, without the variation selector."""
    return code.lower().replace("-fe0f", "")


def crop_to_square(image: Image.Image) -> NDArray[np.uint8]:
    """Crop an image to its opaque part and centre that in a square of OBJECT_SIZE: premultiplied RGBA."""
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
    """Tone-map all panoramas and write them as one file: name → uint8 (256, 512, 3), equirectangular."""
    save({path.name.split(".")[0]: tone_map(read_exr(path)) for path in sorted(hdri.glob("*.exr.js"))}, out)
    log.info("panoramas: %s", out.name)


def read_exr(path: Path) -> NDArray[np.float32]:
    """The linear light, (H, W, 3), of an EXR file in a JavaScript module, where it is a base64 data URI."""
    try:
        import OpenEXR
    except ImportError as error:
        raise FetchError("reading the panoramas needs OpenEXR: pip install OpenEXR") from error
    text = path.read_text(encoding="ascii")
    exr = path.with_suffix("")  # without .js
    exr.write_bytes(base64.b64decode(text[text.index("base64,") + len("base64,") : text.rindex("'")]))
    with OpenEXR.File(str(exr)) as file:
        light = np.array(file.channels()["RGB"].pixels, dtype=np.float32)
    light = np.nan_to_num(light, nan=0, posinf=6e4).clip(min=0)
    holes = (light <= 0).any(axis=2, keepdims=True)  # compression artefacts beside lamps and the sun
    return np.where(holes, grey_closing(light, size=(7, 7, 1), mode="nearest"), light)


def tone_map(light: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Map linear light to sRGB bytes by x (1 + x / 9) / (1 + x), with x scaled to a log-mean luminance of 0.23."""
    luminance = light @ np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)
    x = light * (0.23 / np.exp(np.log(luminance + 1e-4).mean()))
    x = (x * (1 + x / 9) / (1 + x)).clip(0, 1)
    mapped: NDArray[np.uint8] = (x ** (1 / 2.2) * 255).round().astype(np.uint8)
    return mapped


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m synthgen.tiny.fetch", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder for the packages and the prepared data")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        fetch(parser.parse_args().data)
    except FetchError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
