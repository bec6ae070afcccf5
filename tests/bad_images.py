"""Pictures as they lie in the folders of the world: makers of files that must be refused, and of odd ones that must be read."""
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 40
RED = Image.new("RGB", (SIDE, SIDE), "red")


def _png(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, "PNG")


def _truncated(path: Path) -> None:
    _png(path)
    path.write_bytes(path.read_bytes()[:-1500])


BAD = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no picture"),
    "truncated PNG": _truncated,
    "30,000 x 30,000": lambda path: Image.new("1", (30_000, 30_000)).save(path, "PNG"),
}
ODD = {
    "CMYK JPEG": lambda path: Image.new("CMYK", (SIDE, SIDE), (10, 20, 30, 40)).save(path, "JPEG"),
    "16-bit PNG": lambda path: Image.fromarray(np.full((SIDE, SIDE), 40_000, np.uint16)).save(path, "PNG"),
    "animated WebP": lambda path: Image.new("RGB", (SIDE, SIDE)).save(path, "WEBP", save_all=True, append_images=[RED]),
}
