"""Transforms, data sets and decoding against independent implementations, the paper's shares, worker counts and damaged files."""

import io
import random
import warnings
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy import stats
from skimage import data
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2.functional import gaussian_blur as torchvision_blur

from imaginet_nb.data import augmentation as T
from imaginet_nb.data import corruptions as C
from imaginet_nb.data.datasets import ManifestDataset, make_loader
from imaginet_nb.data.images import ImageError, check_image, decode, save

ROCKET = data.rocket()
TILE = np.ascontiguousarray(ROCKET[330:370, 300:340]) # 40 x 40, lights and lattice: no symmetry
SYMMETRIES = [(turns, flip) for flip in (False, True) for turns in range(4)]


def draw(n: int) -> np.random.Generator:
    return np.random.default_rng([20240729, n])


def symmetric(image: np.ndarray, turns: int, flip: bool) -> np.ndarray:
    turned = np.rot90(image, turns)
    return turned[:, ::-1] if flip else turned


def undo(image: np.ndarray, turns: int, flip: bool) -> np.ndarray:
    return np.rot90(image[:, ::-1] if flip else image, -turns)


def assert_shares(counts: Counter, shares: dict, n: int) -> None:
    "Every count within 4 standard deviations of a binomial; nothing else was counted."
    assert set(counts) <= set(shares)
    assert sum(shares.values()) == pytest.approx(1)
    for key, share in shares.items():
        assert abs(counts[key] - n*share) <= 4*np.sqrt(n*share*(1 - share)), f"{key}: {counts[key]} of {n}, expected {share:.4f}"


# ---------------------------------------------------------------- what a result was made by, told from its pixels

def pillow_coded(image: np.ndarray, kind: str, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind.upper(), quality=quality)
    return np.array(Image.open(buffer).convert("RGB"))


def dictionary(tile: np.ndarray, lowest: int, highest: int) -> dict[bytes, tuple]:
    "Bytes of every outcome that is no noise and no rescaling."
    known = {tile.tobytes(): ("none",)}
    for quality in range(lowest, highest + 1):
        for kind in ("jpeg", "webp"): known.setdefault(T.compress(tile, kind, quality).tobytes(), (kind, quality))
    for kernel in (3, 5, 7): known[T.gaussian_blur(tile, kernel).tobytes()] = ("blur", kernel)
    return known


def classify(result: np.ndarray, known: dict[bytes, tuple], tile: np.ndarray) -> tuple[tuple, tuple | None]:
    "(what, symmetry) of a result; noise stays close to the tile, a rescaled image does not."
    for symmetry in SYMMETRIES:
        what = known.get(undo(result, *symmetry).tobytes())
        if what: return what, symmetry
    distances = [np.abs(undo(result, *s).astype(float) - tile).mean() for s in SYMMETRIES]
    best = int(np.argmin(distances))
    return (("noise",), SYMMETRIES[best]) if distances[best] < 4 else (("rescaled",), None)


# ---------------------------------------------------------------- shares of the paper's table

N = 4000
SHARES_STAGE1 = {
    "code": {"none": 1/2, "jpeg": 1/12, "webp": 1/12, "blur": 1/6, "noise": 1/6},
    "paper": {"none": 1/2, "jpeg": 1/8, "webp": 1/8, "blur": 1/8, "noise": 1/8}}
_B = 0.5*(1/1.3)*0.7 # stage 2, code: half of the images, branch B, corrupted
SHARES_STAGE2 = {
    "code": {"rescaled": 0.5*0.3/1.3, "jpeg": _B/6, "webp": _B/6, "blur": _B/3, "noise": _B/3, "none": 1 - 0.5*0.3/1.3 - _B},
    "paper": {"rescaled": 0.15, "jpeg": 0.35/4, "webp": 0.35/4, "blur": 0.35/4, "noise": 0.35/4, "none": 0.5}}


def symmetry_shares(probabilities: str) -> dict[tuple, float]:
    "Shares of the eight symmetries, summed over all turns and flips."
    tile, shares = np.arange(16).reshape(4, 4), Counter()
    turns = {"code": [0, 1, 2, 3], "paper": [1, 3]}[probabilities]
    flips = {"code": [(0,), (1,), (0, 1)], "paper": [(0,), (1,)]}[probabilities]
    name = {symmetric(tile, *s).tobytes(): s for s in SYMMETRIES}
    for turn, p in [(0, 0.67), *((k, 0.33/len(turns)) for k in turns)]:
        for flip, q in [((), 0.67), *((f, 0.33/len(flips)) for f in flips)]:
            shares[name[np.flip(np.rot90(tile, turn), flip).tobytes()]] += p*q
    return dict(shares)


@pytest.fixture(scope="module")
def training_outcomes() -> dict[tuple[str, str], list]:
    known, outcomes = dictionary(TILE, 50, 95), {}
    for probabilities in ("code", "paper"):
        for stage in (T.Stage1(40, probabilities), T.Stage2(40, probabilities)):
            outcomes[type(stage).__name__, probabilities] = [classify(stage(TILE, draw(n)), known, TILE) for n in range(N)]
    return outcomes


@pytest.mark.parametrize("probabilities", ["code", "paper"])
@pytest.mark.parametrize(("stage", "shares"), [("Stage1", SHARES_STAGE1), ("Stage2", SHARES_STAGE2)])
def test_shares_of_corruptions(training_outcomes, stage, shares, probabilities):
    # fails for: code and text exchanged, branch weights not normalised, the 0.7 of branch B forgotten
    outcomes = training_outcomes[stage, probabilities]
    assert_shares(Counter(what[0] for what, _ in outcomes), shares[probabilities], N)


@pytest.mark.parametrize("probabilities", ["code", "paper"])
@pytest.mark.parametrize("stage", ["Stage1", "Stage2"])
def test_shares_of_turns_and_flips(training_outcomes, stage, probabilities):
    # fails for: one draw for both, a turn that is never 0 in the code, a flip of both in the text
    seen = [symmetry for _, symmetry in training_outcomes[stage, probabilities] if symmetry]
    assert_shares(Counter(seen), symmetry_shares(probabilities), len(seen))


def test_strengths_in_training(training_outcomes):
    # fails for: kernels drawn evenly, quality 95 or 50 never drawn, qualities outside
    outcomes = [what for stage in ("Stage1", "Stage2") for what, _ in training_outcomes[stage, "code"]]
    kernels = Counter(what[1] for what in outcomes if what[0] == "blur")
    assert_shares(kernels, {3: 0.2, 5: 0.4, 7: 0.4}, sum(kernels.values()))
    for kind in ("jpeg", "webp"):
        qualities = [what[1] for what in outcomes if what[0] == kind]
        assert min(qualities) == 50 and max(qualities) >= 94
        assert abs(np.mean(qualities) - 72.5) < 4*np.sqrt((46**2 - 1)/12/len(qualities)) + 1 # +1: neighbours can give the same pixels


def test_quality_95_is_reached_and_96_is_not():
    ends = {T.compress(TILE, kind, quality).tobytes(): quality for kind in ("jpeg", "webp") for quality in (95, 96)}
    for compression in (T.random_compression, T.corrupt):
        seen = {ends.get(compression(TILE, draw(n)).tobytes()) for n in range(2500)}
        assert 95 in seen and 96 not in seen


def test_half_of_branch_a_is_compressed():
    stage = T.Stage2(40)
    plain = sum(np.array_equal(stage.branch_a(TILE, draw(n)), T.random_resized_crop(TILE, 40, draw(n))) for n in range(1000))
    assert_shares(Counter(plain=plain, compressed=1000 - plain), {"plain": 0.5, "compressed": 0.5}, 1000)


def test_noise_variance_is_uniform_from_3_to_10_and_without_bias():
    # fails for: standard deviation taken for variance, one noise for all channels, fractions cut off
    grey, variances, means, correlations = np.full((64, 64, 3), 128, np.uint8), [], [], []
    for n in range(1200):
        noise = T.corrupt(grey, draw(n)).astype(float) - 128
        if noise.std() < 0.5: continue # a flat image survives blur and compression
        variances.append(noise.var() - 1/12)
        means.append(noise.mean())
        correlations.append(np.corrcoef(noise.reshape(-1, 3).T)[np.triu_indices(3, 1)])
    assert_shares(Counter(noise=len(variances), other=1200 - len(variances)), {"noise": 1/3, "other": 2/3}, 1200)
    assert 2.8 < min(variances) < 3.3 and 9.7 < max(variances) < 10.4
    assert stats.kstest(variances, stats.uniform(3, 7).cdf).pvalue > 1e-3
    assert abs(np.mean(means)) < 0.01 and np.abs(np.mean(correlations, 0)).max() < 0.005


def test_perturbation_compresses_three_of_four_between_60_and_100():
    known = dictionary(TILE, 60, 100)
    outcomes = [known[C.Perturb(40)(TILE, draw(n)).tobytes()] for n in range(N)] # a KeyError is an outcome that must not be
    assert_shares(Counter(what[0] for what in outcomes), {"none": 1/4, "jpeg": 3/8, "webp": 3/8}, N)
    qualities = {what[1] for what in outcomes if what[0] == "jpeg"}
    assert min(qualities) == 60 and max(qualities) >= 99


@pytest.mark.parametrize(("cap", "largest"), [(100, 100), (1000, 180), (None, 180), (30, 40)])
def test_perturbation_crop_side(cap, largest):
    # fails for: no cap, the longer side, the end left out, a side below the output size
    ramp = np.broadcast_to(np.arange(250, dtype=np.uint8)[None, :, None], (180, 250, 3)).copy() # grey: compression hardly hurts it
    perturb, sides, corners = C.Perturb(40, crop_cap=cap), [], []
    for n in range(1500):
        result = perturb(ramp, draw(n)).astype(float)
        slope = np.polyfit(np.arange(30), result[5:35, 5:35, 0].mean(0), 1)[0] # pixels of the image for each of the result
        sides.append(40*slope)
        corners.append(result[..., 0].min())
    sides = np.array(sides)
    assert sides.min() > 36 and sides.max() < largest + 3
    if largest > 40:
        assert sides.max() > largest - 3
        assert stats.kstest(sides, stats.uniform(39.5, largest - 39).cdf).statistic < 1.95/np.sqrt(1500)
    assert min(corners) < 10 and max(corners) > 200 - largest*0.1 # crops reach from edge to edge


# ---------------------------------------------------------------- independent implementations

def test_pure_colours_keep_their_place():
    # fails for: red and blue exchanged before, after, or in one of the two coders
    for channel in range(3):
        image = np.zeros((48, 48, 3), np.uint8)
        image[..., channel] = 255
        for kind in ("jpeg", "webp"):
            assert np.abs(T.compress(image, kind, 90).astype(int) - image).max() <= 6


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
@pytest.mark.parametrize("quality", [50, 75, 95, 100])
def test_compression_equals_pillows(kind, quality):
    # fails for: compressing with exchanged colours, another chroma subsampling, lossless WebP at 100
    image = data.coffee()[100:228, 200:328]
    ours, theirs = T.compress(image, kind, quality).astype(int), pillow_coded(image, kind, quality).astype(int)
    swapped = pillow_coded(image[..., ::-1], kind, quality)[..., ::-1].astype(int)
    assert np.abs(ours - theirs).mean() < 0.3
    assert np.abs(ours - swapped).mean() > 0.5
    assert np.abs(ours - image).mean() > 0.3


@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_blur_equals_torchvisions(kernel):
    image = data.coffee()[100:200, 200:300]
    sigma = 0.3*((kernel - 1)/2 - 1) + 0.8
    theirs = torchvision_blur(torch.from_numpy(image.copy()).permute(2, 0, 1), [kernel]*2, [sigma]*2).permute(1, 2, 0).numpy()
    assert np.abs(T.gaussian_blur(image, kernel).astype(int) - theirs).max() <= 1


@pytest.mark.parametrize(("height", "width"), [(300, 400), (96, 96), (250, 1000)])
def test_resized_crop_is_distributed_as_torchvisions(height, width):
    torch.manual_seed(0)
    blank, n = torch.zeros(3, height, width), 2000
    theirs = np.array([RandomResizedCrop.get_params(blank, [0.08, 1.0], [3/4, 4/3]) for _ in range(n)], float)
    ours = np.array([T.resized_crop_box(height, width, draw(k)) for k in range(n)], float)
    for a, b in zip([*ours.T, ours[:, 2]*ours[:, 3], ours[:, 3]/ours[:, 2]],
                    [*theirs.T, theirs[:, 2]*theirs[:, 3], theirs[:, 3]/theirs[:, 2]], strict=True):
        assert stats.ks_2samp(a, b).pvalue > 1e-3


@pytest.mark.parametrize(("height", "width"), [(10, 1000), (1000, 10), (7, 90)])
def test_resized_crop_falls_back_as_torchvisions(height, width):
    blank = torch.zeros(3, height, width)
    assert T.resized_crop_box(height, width, draw(0)) == tuple(RandomResizedCrop.get_params(blank, [0.9, 1.0], [3/4, 4/3]))


@pytest.mark.parametrize(("height", "width", "size"), [(5, 7, 40), (2, 3, 31), (1, 4, 9), (1, 1, 6), (39, 60, 40)])
def test_padding_mirrors_again_and_again(height, width, size):
    # fails for: repeating the edge pixel, one mirroring only, the image not in the middle
    image = draw(0).integers(0, 256, (height, width, 3), np.uint8)

    def source(length):
        surplus = max(size - length, 0)
        place, period = np.arange(-(surplus//2), length + surplus - surplus//2), max(2*(length - 1), 1)
        place = np.abs(place) % period
        return np.minimum(place, period - place) if length > 1 else 0*place

    expected = image[source(height)][:, source(width)]
    assert np.array_equal(T.pad_to(image, size), expected)


def lanczos4(image: np.ndarray, size: int) -> np.ndarray:
    "Eight-tap Lanczos interpolation without smoothing, edge pixels repeated; rows, then columns."
    for axis in (0, 1):
        length = image.shape[axis]
        place = (np.arange(size) + 0.5)*length/size - 0.5
        taps = np.floor(place).astype(int)[:, None] + np.arange(-3, 5)
        distance = place[:, None] - taps
        weights = np.sinc(distance)*np.sinc(distance/4)
        weights /= weights.sum(1, keepdims=True)
        gathered = np.take(image, np.clip(taps, 0, length - 1), axis=axis) # the axis becomes (size, 8)
        image = np.moveaxis(np.einsum("ij,ij...->i...", weights, np.moveaxis(gathered, (axis, axis + 1), (0, 1))), 0, axis)
    return image


@pytest.mark.parametrize("step", [12, 9, 5, 2])
def test_resizing_is_lanczos_without_antialiasing(step):
    # fails for: another filter, smoothing before shrinking, a crop of another side
    image = data.coffee()[:400, :400]
    side = int(64*12/step)
    top = (400 - side)//2
    expected = np.clip(lanczos4(image[top:top + side, top:top + side].astype(float), 64), 0, 255)
    ours = C.ResizeAt(step, 64)(image).astype(float)
    assert np.abs(ours - expected).mean() < 0.6 and np.abs(ours - expected).max() <= 4
    if step < 6:
        smoothed = cv2.resize(image[top:top + side, top:top + side], (64, 64), interpolation=cv2.INTER_AREA)
        assert np.abs(smoothed - expected).mean() > 1.5


# ---------------------------------------------------------------- pure functions

TRANSFORMS = [T.Stage1(64), T.Stage2(96), T.Stage2(96, "paper"), C.Perturb(64),
              T.CenterCrop(96), C.CompressAt("jpeg", 70, 96), C.ResizeAt(3, 64)]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=repr)
@pytest.mark.parametrize("shape", [(160, 240), (97, 64), (20, 30), (1, 1)])
def test_transforms_leave_image_and_global_state_alone(transform, shape):
    image = np.ascontiguousarray(ROCKET[:shape[0], :shape[1]])
    before, state = image.copy(), (random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state())
    for n in range(12):
        result = transform(image, draw(n))
        assert check_image(result).shape == (transform.size, transform.size, 3)
        assert np.array_equal(result, transform(image, draw(n)))
        result[:] = 0 if result.base is None else result # a result that owns its pixels may be written to
        assert np.array_equal(image, before)
    assert random.getstate() == state[0] and np.random.get_state()[1].tobytes() == state[1] and torch.equal(torch.get_rng_state(), state[2])


# ---------------------------------------------------------------- workers, batches, processes

@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for i in range(11): save(ROCKET[10*i:10*i + 90 + 9*i, 20*i:20*i + 200 - 7*i], root/f"{i}.png")
    return root


@pytest.fixture
def manifest() -> pd.DataFrame:
    family = ["real", "GAN", "SD", "real", "Midjourney", "DALL-E 3", "real", "SD", "real", "GAN", "real"]
    return pd.DataFrame({"path": [f"{i}.png" for i in range(11)], "origin": ["real" if f == "real" else "synthetic" for f in family],
                         "content_type": "photos", "generator_family": family, "generator": "x", "split": "train"})


def passes(dataset: ManifestDataset, batch_size: int, workers: int, **options) -> list[dict[int, bytes]]:
    "Bytes by row for three epochs of one loader, whose workers stay alive."
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader, result = make_loader(dataset, batch_size, shuffle=True, num_workers=workers, **options), []
        for epoch in (0, 1, 0):
            dataset.set_epoch(epoch)
            result.append({int(r): i.numpy().tobytes() for images, _, _, rows in loader for r, i in zip(rows, images, strict=True)})
    return result


@pytest.mark.parametrize("transform", [T.Stage1(64), T.Stage2(96), C.Perturb(64)], ids=repr)
def test_bytes_do_not_depend_on_workers_or_batch_size(folder, manifest, transform):
    # fails for: a stream per worker, per batch or per process; an epoch that does not reach living workers
    dataset = ManifestDataset(manifest, folder, transform, seed=3, stage="any")
    reference = passes(dataset, 4, 0)
    assert len(reference[0]) == 11 and list(reference[0]) != list(reference[1])
    assert reference[0] == reference[2] and all(reference[0][row] != reference[1][row] for row in range(11))
    for workers, batch_size in [(0, 1), (1, 4), (1, 11), (3, 2), (3, 5)]:
        other = passes(dataset, batch_size, workers)
        assert [list(p.items()) for p in other] == [list(p.items()) for p in reference], f"{workers} workers, batches of {batch_size}"


def test_bytes_do_not_depend_on_cache_order_or_subset(folder, manifest):
    dataset = ManifestDataset(manifest, folder, T.Stage2(64), seed=3, stage="any")
    direct = {row: dataset[row][0].numpy().tobytes() for row in reversed(range(11))}
    assert passes(dataset, 4, 0)[0] == direct
    assert passes(ManifestDataset(manifest, folder, T.Stage2(64), seed=3, stage="any", cache=True), 4, 1) == passes(dataset, 4, 0)


def test_each_row_has_a_stream_of_its_own(folder, manifest):
    # fails for: one stream for an epoch, which would give all images of a size the same crop and the same damage
    same = ManifestDataset(manifest.assign(path="5.png"), folder, T.Stage1(64), seed=3, stage="any")
    assert len({content for epoch in passes(same, 4, 1)[:2] for content in epoch.values()}) == 22


def test_processes_share_one_order(folder, manifest):
    # fails for: each process with a shuffling of its own, or contiguous blocks
    dataset = ManifestDataset(manifest, folder, T.Stage1(32), seed=3, stage="any")
    whole = [r for *_, rows in make_loader(dataset, 4, shuffle=True) for r in [rows.tolist()]]
    parts = [[rows.tolist() for *_, rows in make_loader(dataset, 2, shuffle=True, rank=rank, world_size=2)] for rank in range(2)]
    for step, rows in enumerate(whole[:2]): assert sorted(parts[0][step] + parts[1][step]) == sorted(rows)
    assert sum(map(len, parts[0])) == sum(map(len, parts[1])) == 6 # 11 images: one comes twice
    assert {row for part in parts for rows in part for row in rows} == set(range(11))


def test_labels_travel_with_their_image(folder, manifest):
    dataset = ManifestDataset(manifest, folder, T.CenterCrop(64), seed=0, stage="any")
    codes = {"GAN": 0, "SD": 1, "Midjourney": 2, "DALL-E 3": 3, "real": 4}
    for images, origin, family, rows in make_loader(dataset, 3, shuffle=True, num_workers=1):
        assert images.dtype == torch.uint8 and images.shape[1:] == (3, 64, 64)
        for image, o, f, row in zip(images, origin, family, rows, strict=True):
            wanted = manifest.iloc[int(row)]
            assert int(f) == codes[wanted.generator_family] and int(o) == (wanted.origin == "synthetic")
            assert np.array_equal(image.permute(1, 2, 0), T.center_crop(decode(folder/wanted.path), 64))


# ---------------------------------------------------------------- damaged files

def contents() -> dict[str, bytes]:
    picture, result = Image.fromarray(TILE), {}
    exif = Image.Exif()
    exif[0x0112] = 8
    for name, format, options in [
            ("png", "PNG", {}), ("jpeg", "JPEG", {"exif": exif}), ("webp", "WEBP", {"exif": exif}),
            ("lossless", "WEBP", {"lossless": True}), ("gif", "GIF", {}), ("bmp", "BMP", {}),
            ("tiff", "TIFF", {}), ("lzw", "TIFF", {"compression": "tiff_lzw"})]:
        buffer = io.BytesIO()
        picture.save(buffer, format, **options)
        result[name] = buffer.getvalue()
    return result


@pytest.mark.parametrize("name", contents())
def test_half_a_file_is_an_error_that_names_it(tmp_path, name):
    content, path = contents()[name], tmp_path/f"half.{name}"
    for share in (0.02, 0.5, 0.9):
        path.write_bytes(content[:int(share*len(content))])
        with pytest.raises(ImageError, match=f"half.{name}: "): decode(path)


def test_changed_byte_of_a_png_is_noticed():
    # fails for: trusting pixels that decode although the file's check sums say that they are wrong
    content = contents()["png"]
    assert np.array_equal(decode(content[:-12]), decode(content)) # only the end chunk is missing: all pixels are there
    with pytest.raises(ImageError): decode(content[:-13])
    for place in [*range(30, len(content) - 24, 97), *range(len(content) - 24, len(content) - 12)]:
        changed = content[:place] + bytes([content[place] ^ 1]) + content[place + 1:]
        with pytest.raises(ImageError): decode(changed)


@pytest.mark.parametrize("name", contents())
def test_changed_bytes_give_an_image_or_an_image_error_and_no_noise(name, capfd):
    # fails for: an exception of Pillow's that gets through, warnings, libtiff's lines on the screen
    generator, content = draw(0), contents()[name]
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for _ in range(150):
            changed = bytearray(content)
            for place in generator.integers(0, len(changed), generator.integers(1, 9)): changed[place] = generator.integers(256)
            try: check_image(decode(bytes(changed), max_pixels=1_000_000))
            except ImageError as error: assert str(error).startswith("image of ")
    captured = capfd.readouterr()
    assert captured.out == captured.err == "" and not heard


@pytest.mark.parametrize(("content", "workers"), [(b"", 0), (b"no image", 0), (contents()["jpeg"][:300], 0), (b"no image", 1)])
def test_damaged_file_stops_the_loader_with_row_and_path(folder, manifest, tmp_path, content, workers):
    # fails for: skipping the file, a blank image in its place, an error without its name
    (tmp_path/"bad.png").write_bytes(content)
    for i in range(11): (tmp_path/f"{i}.png").symlink_to(folder/f"{i}.png")
    manifest.loc[7, "path"] = "bad.png"
    dataset = ManifestDataset(manifest, tmp_path, T.CenterCrop(32), seed=0, stage="any")
    with pytest.raises(ImageError, match=r"manifest row 7: .*bad\.png: "): list(make_loader(dataset, 4, shuffle=False, num_workers=workers))
