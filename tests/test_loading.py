"""Two ways to the same crop: the image files and the packed store."""
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from bad_images import BAD, ODD
from forks import imaginet
from PIL import Image

from imaginet_nb.core import file_sha256, repo_root, rng
from imaginet_nb.data.augmentation import CenterCrop, Stage1, Stage2
from imaginet_nb.data.corruptions import Perturb
from imaginet_nb.data.datasets import ManifestDataset, make_loader
from imaginet_nb.data.images import ImageError, decode, longer_side
from imaginet_nb.data.packed import Store, StoreError, pack, verify_store

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
        assert store[path.name].shape == whole.shape and longer_side(path) == max(whole.shape[:2])
        for _ in range(12):
            (top, bottom), (left, right) = (np.sort(draw.choice(n + 1, 2, replace=False)) for n in whole.shape[:2])
            key = slice(int(top), int(bottom)), slice(int(left), int(right))
            np.testing.assert_array_equal(store[path.name][key], whole[key])


@pytest.mark.parametrize("name", ["plain.png", "jpeg.jpg", "lossy.webp"])
def test_a_size_needs_no_pixels(folder, name, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("decoded"))
    assert longer_side(folder/f"0-{name}") == max(SIDES[0])


@pytest.mark.parametrize("transform", [Stage1(96), Stage2(128), Perturb(128), CenterCrop(96)], ids=lambda t: type(t).__name__)
def test_transforms_give_the_same_bytes(folder, manifest, store, transform):
    for row, path in enumerate(manifest["path"]):
        for epoch in range(2):
            made = [transform(image, rng(0, "test", epoch, row)) for image in (decode(folder/path), store[path])]
            np.testing.assert_array_equal(made[0], made[1], err_msg=path)


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
    manifest = pd.DataFrame({"path": ["bad.png"], "origin": "real", "generator_family": "real"})
    with pytest.raises(ImageError) as found: ManifestDataset(manifest, tmp_path, CenterCrop(8), seed=0, stage="test")[0]
    assert str(found.value) == f"manifest row 0: {usual.value}"


@pytest.mark.parametrize("name", ODD)
def test_odd_files_have_the_size_of_their_pixels(tmp_path, name):
    ODD[name](tmp_path/"odd.png")
    assert longer_side(tmp_path/"odd.png") == max(decode(tmp_path/"odd.png").shape[:2])


@pytest.mark.parametrize("where", [0.3, 0.95], ids=["in the crop", "below the crop"])
def test_a_changed_byte_of_a_png_is_found_wherever_it_is(folder, tmp_path, where):
    content = bytearray((folder/"0-plain.png").read_bytes())
    content[int(where*len(content))] ^= 4
    (tmp_path/"changed.png").write_bytes(content)
    with pytest.raises(ImageError, match="changed.png: damaged"): decode(tmp_path/"changed.png")


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
    with pytest.raises(StoreError, match="an unfinished one"): Store(many/"killed")
    first = (many/"killed"/"shard-00000.b2nd").stat().st_mtime_ns
    rows = pd.read_csv(many/"many.csv")
    pack(rows, many/"many", many/"killed", shard_images=10, jobs=1)
    pack(rows, many/"many", many/"whole", shard_images=10, jobs=1)
    assert packed(many/"killed") == packed(many/"whole") and verify_store(many/"killed") == []
    assert (many/"killed"/"index.npy").read_bytes() == (many/"whole"/"index.npy").read_bytes()
    assert (many/"killed"/"shard-00000.b2nd").stat().st_mtime_ns == first


def test_pack_and_verify_from_the_command_line(many):
    made = imaginet("data", "pack", many/"many", "--list", many/"many.csv", "--out", many/"store")
    assert made.returncode == 0 and "60 images" in made.stdout, made.stderr
    assert imaginet("data", "pack", many/"many", "--out", many/"store", "--verify").stdout.endswith("whole\n")
    shard = many/"store"/"shard-00000.b2nd"
    content = bytearray(shard.read_bytes())
    content[len(content)//2] ^= 1
    shard.write_bytes(content)
    found = imaginet("data", "pack", many/"many", "--out", many/"store", "--verify")
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


@pytest.mark.skipif(sys.platform == "win32", reason="no change time")
def test_a_source_of_the_same_size_and_date_is_packed_anew(tmp_path):
    rows, image = pd.DataFrame({"path": ["a.bmp"]}), tmp_path/"a.bmp"
    Image.new("RGB", (70, 80), "red").save(image)
    before = image.stat()
    pack(rows, tmp_path, tmp_path/"store", jobs=1)
    time.sleep(0.01)
    Image.new("RGB", (70, 80), "blue").save(image)
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (image.stat().st_size, image.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert pack(rows, tmp_path, tmp_path/"store", jobs=1)["a.bmp"][0:1, 0:1].tolist() == [[[0, 0, 255]]]


# --- damaged stores

@pytest.fixture(scope="module")
def six(tmp_path_factory) -> Path:
    "A folder with six images, and their store in two shards."
    folder = tmp_path_factory.mktemp("six")
    (folder/"images").mkdir()
    for i in range(6):
        image = np.random.default_rng(i).integers(0, 256, (90 + i, 120, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder/"images"/f"{i}.png")
    pack(SIX, folder/"images", folder/"store", shard_images=4, jobs=1)
    return folder


@pytest.fixture
def damaged(six, tmp_path) -> Path:
    "A copy of the store, to be damaged."
    return Path(shutil.copytree(six/"store", tmp_path/"store"))


SIX = pd.DataFrame({"path": [f"{i}.png" for i in range(6)]})


def read_all(folder: Path) -> dict[str, np.ndarray]:
    store = Store(folder)
    return {path: store[path][:, :] for path in SIX["path"]}


def change(path: Path, place: int, bits: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= bits
    path.write_bytes(content)


def reindexed(folder: Path, index: np.ndarray, **facts: object) -> None:
    "Another index, with the checksum that belongs to it."
    np.save(folder/"index.npy", index)
    known = json.loads((folder/"store.json").read_text())
    known["sha256"]["index.npy"] = file_sha256(folder/"index.npy")
    (folder/"store.json").write_text(json.dumps(known | facts))


def test_a_changed_byte_of_a_shard_never_gives_other_pixels(damaged):
    """300 places, the frame's head and end among them: the packed pixels, or an error that names the shard and the remedy."""
    good, draw, refused = read_all(damaged), np.random.default_rng(0), 0
    content = (damaged/"shard-00000.b2nd").read_bytes()
    for n in range(300):
        place = int(draw.integers(len(content)))
        if n % 3 == 0: place = int(draw.integers(400)) if n % 2 else len(content) - 1 - int(draw.integers(400))
        (damaged/"shard-00000.b2nd").write_bytes(content)
        change(damaged/"shard-00000.b2nd", place, 1 << int(draw.integers(8)))
        try: found = read_all(damaged)
        except StoreError as error:
            refused += 1
            assert "shard-00000.b2nd" in str(error) and "imaginet data pack" in str(error)
        else: assert all(np.array_equal(found[name], good[name]) for name in good), f"byte {place}"
    assert refused > 150


def test_a_crop_is_checked_and_the_remedy_works(damaged, six):
    good = read_all(damaged)
    content = bytearray((damaged/"shard-00001.b2nd").read_bytes())
    for place in range(300, len(content) - 300, 50): content[place] ^= 1
    (damaged/"shard-00001.b2nd").write_bytes(content)
    with pytest.raises(StoreError, match="shard-00001.b2nd, image 5.png: "): Store(damaged)["5.png"][10:40, 20:50]
    np.testing.assert_array_equal(Store(damaged)["1.png"][10:40, 20:50], good["1.png"][10:40, 20:50])
    (damaged/"shard-00001.b2nd").unlink()
    pack(SIX, six/"images", damaged, shard_images=4, jobs=1)
    assert all(np.array_equal(pixels, good[name]) for name, pixels in read_all(damaged).items()) and verify_store(damaged) == []


@pytest.mark.parametrize("name", ["index.npy", "shard-00000.crc32", "store.json"])
def test_a_changed_byte_of_the_other_files_is_noticed(damaged, name):
    good, content, draw = read_all(damaged), (damaged/name).read_bytes(), np.random.default_rng(1)
    for _ in range(100):
        (damaged/name).write_bytes(content)
        change(damaged/name, int(draw.integers(len(content))), 1 << int(draw.integers(8)))
        try: found = read_all(damaged)
        except StoreError as error: assert str(damaged) in str(error) and "imaginet data pack" in str(error)
        else: assert name != "index.npy" and all(np.array_equal(found[name], good[name]) for name in good)


@pytest.mark.parametrize("entry, value", [("top", 2**40), ("top", 2**64 - 64), ("height", 2**32 - 1), ("width", 2**32 - 1), ("height", 0),
                                          ("width", 0), ("tile", 2**63), ("shard", 7), ("shard", 2**32 - 1)])
def test_an_absurd_entry_is_refused_before_anything_is_allocated(damaged, entry, value):
    index = np.load(damaged/"index.npy")
    index[entry] = value
    reindexed(damaged, index)
    store = Store(damaged)
    tracemalloc.start()
    with pytest.raises(StoreError, match=r"shard-\d+.b2nd"): store["1.png"]
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


@pytest.mark.parametrize("entry, step", [("top", 64), ("tile", 1), ("width", -64), ("shard", 1)])
def test_an_entry_of_another_image_gives_an_error_not_its_pixels(damaged, entry, step):
    index = np.load(damaged/"index.npy")
    index[entry] += np.array(step).astype(index[entry].dtype)
    reindexed(damaged, index)
    with pytest.raises(StoreError, match="shard-0000.*imaginet data pack"): read_all(damaged)


@pytest.mark.parametrize("head", ["(999999999999,)", "(6, 6)", "()", "(-1,)", "(5,)"])
def test_an_index_of_an_absurd_shape_is_refused(damaged, head):
    path = damaged/"index.npy"
    text = path.read_bytes().replace(b"(6,)", head.encode())
    size = int.from_bytes(text[8:10], "little") + len(head) - 4
    path.write_bytes(text[:8] + size.to_bytes(2, "little") + text[10:])
    known = json.loads((damaged/"store.json").read_text())
    known["sha256"]["index.npy"] = file_sha256(path)
    (damaged/"store.json").write_text(json.dumps(known))
    with pytest.raises(StoreError, match="index.npy: missing or damaged"): Store(damaged)


@pytest.mark.parametrize("text", [
    "", "{", "null", "[]", "{}", '{"version": 1}', '{"version": 3}', '{"version": 3, "images": -1, "sha256": {}}', "["*100_000,
    '{"version": 3, "images": 6, "sha256": {"../secret": "' + "0"*64 + '"}}', '{"version": 3, "images": 6, "sha256": {"index.npy": 5}}',
    '{"version": ' + "9"*5000 + "}"], ids=range(12))
def test_an_odd_store_json_is_named(damaged, text):
    (damaged/"store.json").write_text(text)
    for read in (Store, verify_store):
        with pytest.raises(StoreError, match="store.json: .*imaginet data pack") as error: read(damaged)
        assert len(str(error.value)) < 500


def test_a_store_without_checksums_is_packed_again(damaged, six):
    """A store of an earlier release has version 1: refused with the remedy, and the remedy works."""
    good = read_all(damaged)
    known = json.loads((damaged/"store.json").read_text())
    (damaged/"store.json").write_text(json.dumps(known | {"version": 1}))
    for old in damaged.glob("*.crc32"): old.unlink()
    with pytest.raises(StoreError, match="store.json: version 1, .*run `imaginet data pack` again"): Store(damaged)
    pack(SIX, six/"images", damaged, shard_images=4, jobs=1)
    assert all(np.array_equal(pixels, good[name]) for name, pixels in read_all(damaged).items())


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"mark": 1}', '{"mark": 1, "sha256": []}', "["*100_000], ids=range(6))
def test_what_is_known_about_a_shard_may_be_damaged(damaged, six, text):
    """The shard is packed anew."""
    good = read_all(damaged)
    (damaged/"shard-00000.json").write_text(text)
    change(damaged/"shard-00001.npy", 140)
    pack(SIX, six/"images", damaged, shard_images=4, jobs=1)
    assert all(np.array_equal(pixels, good[name]) for name, pixels in read_all(damaged).items())


@pytest.mark.skipif(os.name == "nt", reason="names are no bytes there")
def test_a_picture_with_any_name_is_packed_and_trained_on_under_its_text(tmp_path):
    "A manifest names files as `path_text` writes them."
    picture = np.random.default_rng(0).integers(0, 256, (70, 80, 3), dtype=np.uint8)
    with open(os.fsencode(tmp_path) + b"/caf\xe9.png", "wb") as file: Image.fromarray(picture).save(file, "PNG")
    manifest = pd.DataFrame({"path": [r"caf\xe9.png"], "origin": "real", "generator_family": "real", "generator": "real",
                             "content_type": "photos", "split": "train"})
    store = pack(manifest, tmp_path, tmp_path/"store")
    assert np.array_equal(store[r"caf\xe9.png"][:, :], picture)
    image, *_ = ManifestDataset(manifest, tmp_path, CenterCrop(64), 0, "train")[0]
    assert np.array_equal(image.numpy().transpose(1, 2, 0), picture[3:67, 8:72])


@pytest.mark.parametrize("size", [0, 100])
def test_a_shard_that_is_cut_off_is_packed_again(tmp_path, size):
    picture = np.random.default_rng(0).integers(0, 256, (70, 80, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path/"a.png")
    manifest = pd.DataFrame({"path": ["a.png"]})
    pack(manifest, tmp_path, tmp_path/"store")
    shard = tmp_path/"store"/"shard-00000.b2nd"
    shard.write_bytes(shard.read_bytes()[:size])
    assert np.array_equal(pack(manifest, tmp_path, tmp_path/"store")["a.png"][:, :], picture)
