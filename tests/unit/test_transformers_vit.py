"""What is said where the ``transformers`` form of an encoder cannot be written."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from synthgen.errors import StorageError
from synthgen.models.transformers_vit import save_transformers
from synthgen.models.vit import EncoderConfig, VisionTransformer

TOLD = r"^cannot write {}: .*; free some space or choose another --run folder, then run the same command again"


@pytest.fixture
def encoder() -> VisionTransformer:
    return VisionTransformer(EncoderConfig(image_size=16, patch_size=4, dim=32, depth=1, num_heads=2))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
def test_a_full_disk_is_one_line(encoder: VisionTransformer, tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=TOLD.format(tmp_path)):
        save_transformers(encoder, tmp_path)


def test_weights_that_do_not_fit_are_one_line(encoder: VisionTransformer, tmp_path: Path) -> None:
    """Safetensors writes them, and has an error of its own for it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))  # bytes of a file; config.json has fewer
    try:
        with pytest.raises(StorageError, match=TOLD.format(tmp_path)) as caught:
            save_transformers(encoder, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    save_transformers(encoder, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size > 8192
