"""Three ways to the same crop: whole decoding, partial decoding, the packed store."""
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from bad_images import BAD, ODD
from PIL import Image

from imaginet_nb.core import repo_root, rng
from imaginet_nb.data.augmentation import CenterCrop, Perturb, Stage1, Stage2
from imaginet_nb.data.datasets import ManifestDataset, make_loader
from imaginet_nb.data.images import ImageError, LazyImage, decode
from imaginet_nb.data.packed import Store, StoreError, pack, verify_store

PROGRAM = Path(sys.executable).with_name("imaginet")
WRITERS = {
    "plain.png": {}, "best.png": {"compress_level": 9}, "grey.png": {"mode": "L"}, "alpha.png": {"mode": "RGBA"},
    "palette.png": {"mode": "P"}, "camera.png": {"turned": True},
    "jpeg.jpg": {"quality": 85}, "full.jpg": {"quality": 95, "subsampling": 0}, "progressive.jpg": {"progressive": True},
    "grey.jpg": {"mode": "L"}, "cmyk.jpg": {"mode": "CMYK"}, "camera.jpg": {"turned": True},
    "lossy.webp": {"quality": 70}, "fine.webp": {"quality": 100, "method": 6}, "lossless.webp": {"lossless": True},
    "alpha.webp": {"mode": "RGBA"}, "camera.webp": {"turned": True},
    "plain.bmp": {}, "plain.tif": {}, "plain.gif": {"mode": "P"}}
SIDES = ((203, 321), (64, 64), (33, 150)) # larger than the crop, a whole block, smaller than the crop


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    "Every kind of file in several sizes, smooth below noise so that coders have something to do."
    folder = tmp_path_factory.mktemp("images")
    for number, (h, w) in enumerate(SIDES):
        noise = np.random.default_rng(number)
        smooth = cv2.resize(noise.integers(0, 256, (6, 6, 3), dtype=np.uint8), (w, h), interpolation=cv2.INTER_CUBIC)
        picture = Image.fromarray(np.clip(smooth + noise.normal(0, 8, (h, w, 3)), 0, 255).astype(np.uint8))
        for name, options in WRITERS.items():
            options = dict(options)
            if options.pop("turned", False):
                options["exif"] = exif = Image.Exif()
                exif[0x0112] = 6
            picture.convert(options.pop("mode", "RGB")).save(folder/f"{number}-{name}", **options)
    return folder


@pytest.fixture(scope="module")
def manifest(folder) -> pd.DataFrame:
    paths = sorted(p.name for p in folder.iterdir() if p.is_file())
    return pd.DataFrame({"path": paths, "origin": "real", "generator_family": "real"})


@pytest.fixture(scope="module")
def store(folder, manifest, tmp_path_factory) -> Store:
    return pack(manifest, folder, tmp_path_factory.mktemp("store")/"packed", shard_images=17, jobs=1)


@pytest.mark.parametrize("name", WRITERS)
def test_any_part_of_any_file_is_that_of_the_whole(folder, store, name):
    for number in range(len(SIDES)):
        path, draw = folder/f"{number}-{name}", np.random.default_rng(number)
        whole = decode(path)
        assert LazyImage(path).shape == store[path.name].shape == whole.shape
        for _ in range(12):
            (top, bottom), (left, right) = (np.sort(draw.choice(n + 1, 2, replace=False)) for n in whole.shape[:2])
            key = slice(int(top), int(bottom)), slice(int(left), int(right))
            np.testing.assert_array_equal(LazyImage(path)[key], whole[key])
            np.testing.assert_array_equal(store[path.name][key], whole[key])


@pytest.mark.parametrize("name", ["plain.png", "jpeg.jpg", "lossy.webp"])
def test_common_files_are_not_decoded_as_a_whole(folder, name, monkeypatch):
    monkeypatch.setattr("imaginet_nb.data.images.decode", lambda *_: pytest.fail("decoded as a whole"))
    assert LazyImage(folder/f"0-{name}")[10:40, 10:50].shape == (30, 40, 3)


@pytest.mark.parametrize("transform", [Stage1(96), Stage2(128), Perturb(128), CenterCrop(96)], ids=lambda t: type(t).__name__)
def test_transforms_give_the_same_bytes(folder, manifest, store, transform):
    for row, path in enumerate(manifest["path"]):
        for epoch in range(2):
            made = [transform(image, rng(0, "test", epoch, row)) for image in (decode(folder/path), LazyImage(folder/path), store[path])]
            np.testing.assert_array_equal(made[0], made[1], err_msg=path)
            np.testing.assert_array_equal(made[0], made[2], err_msg=path)


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_give_the_same_batches(folder, manifest, store, workers):
    def batches(**where):
        data = ManifestDataset(manifest, folder, Stage1(48), seed=1, stage="test", **where)
        return torch.cat([batch[0] for batch in make_loader(data, 7, shuffle=True, num_workers=workers)])
    plain = batches(cache=True)
    assert torch.equal(plain, batches()) and torch.equal(plain, batches(store=store))


@pytest.mark.parametrize("name", BAD)
def test_bad_files_have_the_usual_errors(tmp_path, name):
    BAD[name](tmp_path/"bad.png")
    with pytest.raises(ImageError) as usual: decode(tmp_path/"bad.png")
    with pytest.raises(ImageError) as lazy: LazyImage(tmp_path/"bad.png")[:8, :8]
    assert str(lazy.value) == str(usual.value)


@pytest.mark.parametrize("name", ODD)
def test_odd_files_are_read_as_usual(tmp_path, name):
    ODD[name](tmp_path/"odd.png")
    np.testing.assert_array_equal(LazyImage(tmp_path/"odd.png")[3:9, 4:8], decode(tmp_path/"odd.png")[3:9, 4:8])


@pytest.mark.parametrize("where", [0.3, 0.95], ids=["in the crop", "below the crop"])
def test_a_changed_byte_of_a_png_is_found_wherever_it_is(folder, tmp_path, where):
    content = bytearray((folder/"0-plain.png").read_bytes())
    content[int(where*len(content))] ^= 4
    (tmp_path/"changed.png").write_bytes(content)
    with pytest.raises(ImageError, match="changed.png: damaged"): LazyImage(tmp_path/"changed.png")[:100, :50]


# --- packing

@pytest.fixture
def many(tmp_path) -> Path:
    for i in range(60):
        image = np.random.default_rng(i).integers(0, 256, (90 + i, 120, 3), dtype=np.uint8)
        (tmp_path/"many").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path/"many"/f"{i:02d}.png")
    rows = [f"{i:02d}.png,real,photos,real,real,train" for i in range(60)]
    (tmp_path/"many.csv").write_text("\n".join(["path,origin,content_type,generator_family,generator,split", *rows]) + "\n")
    return tmp_path


def packed(folder: Path) -> dict[str, bytes]:
    store = Store(folder)
    return {f"{i:02d}.png": store[f"{i:02d}.png"][:, :].tobytes() for i in range(60)}


SLOWLY = """
import sys, pandas as pd, imaginet_nb.data.packed as S
append, seen = S._append, []
def stop_in_the_second(canvas, rows):
    seen.append(1)
    if len(seen) > 15: print("now", flush=True); __import__("time").sleep(60)
    append(canvas, rows)
S._append = stop_in_the_second
S.pack(pd.read_csv(sys.argv[1]), sys.argv[2], sys.argv[3], shard_images=10, jobs=1)
"""


def test_packing_goes_on_after_kill_to_the_same_pixels(many):
    process = subprocess.Popen([sys.executable, "-c", SLOWLY, many/"many.csv", many/"many", many/"killed"], cwd=repo_root(), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None and process.stdout.readline() == "now\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.raises(StoreError, match="not finished"): Store(many/"killed")
    first = (many/"killed"/"shard-00000.b2nd").stat().st_mtime_ns
    rows = pd.read_csv(many/"many.csv")
    pack(rows, many/"many", many/"killed", shard_images=10, jobs=1)
    pack(rows, many/"many", many/"whole", shard_images=10, jobs=1)
    assert packed(many/"killed") == packed(many/"whole") and verify_store(many/"killed") == []
    assert (many/"killed"/"index.npy").read_bytes() == (many/"whole"/"index.npy").read_bytes()
    assert (many/"killed"/"shard-00000.b2nd").stat().st_mtime_ns == first


def test_pack_and_verify_from_the_command_line(many):
    def imaginet(*words): return subprocess.run([PROGRAM, "data", "pack", *map(str, words)], capture_output=True, text=True,
                                                env={**os.environ, "TQDM_DISABLE": "1"})
    made = imaginet(many/"many", "--list", many/"many.csv", "--out", many/"store")
    assert made.returncode == 0 and "60 images" in made.stdout, made.stderr
    assert imaginet(many/"many", "--out", many/"store", "--verify").stdout.endswith("whole\n")
    shard = many/"store"/"shard-00000.b2nd"
    content = bytearray(shard.read_bytes())
    content[len(content)//2] ^= 1
    shard.write_bytes(content)
    found = imaginet(many/"many", "--out", many/"store", "--verify")
    assert found.returncode == 1 and "shard-00000.b2nd" in found.stderr


def test_a_store_opens_without_reading_its_images(many):
    pack(pd.read_csv(many/"many.csv"), many/"many", many/"store", shard_images=10, jobs=1)
    for shard in (many/"store").glob("*.b2nd"): shard.unlink()
    store = Store(many/"store") # neither canvas nor list of paths is needed
    assert len(store) == 60 and isinstance(store.index, np.memmap)
    with pytest.raises(StoreError, match="shard-0000.*missing or damaged"): store["07.png"]
    assert len(verify_store(many/"store")) == 6


def test_a_changed_source_is_packed_anew(many):
    rows = pd.read_csv(many/"many.csv")
    pack(rows, many/"many", many/"store", shard_images=10, jobs=1)
    time.sleep(0.01)
    buffer = io.BytesIO()
    Image.new("RGB", (30, 40), "red").save(buffer, "PNG")
    (many/"many"/"33.png").write_bytes(buffer.getvalue())
    assert pack(rows, many/"many", many/"store", shard_images=10, jobs=1)["33.png"][:, :].tolist() == [[[255, 0, 0]]*30]*40
    assert verify_store(many/"store") == []
