"""Look-alikes of the Corvi and Practical sets: the same folders, list formats and oddities, pictures made of noise."""
import csv
from pathlib import Path

import numpy as np
from PIL import Image

CORVI_FOLDERS = {"progan_lsun": 0, "stylegan2_ffhq_256x256": 1, "stylegan3_r_ffhqu_256x256": 2, "biggan_256": 3, "eg3d": 4,
                 "taming-transformers_segm2image_valid": 5, "dalle-mini_valid": 6, "dalle_2": 7, "glide_text2img_valid": 8,
                 "latent-diffusion_text2img_valid": 9, "stable_diffusion_256": 10, "guided-diffusion_class2image_ImageNet": 11}
REAL_FOLDERS = {"real_coco_valid": "jpg", "real_imagenet_val": "JPEG", "real_ucid": "tif"}
PRACTICAL_FOLDERS = {"DreamBooth": "DreamBooth", "MidjourneyV4": "Midjourney", "MidjourneyV5": "MidjourneyV5", "NightCafe": "NightCafe",
                     "StableAI": "StableDiffusion", "YiJian": "YiJianAI"} # list -> folder


def picture(path: Path, draw: np.random.Generator, synthetic: bool, sides: tuple[int, int]) -> tuple[int, int]:
    "Smooth noise; a synthetic picture carries a checkerboard. Returns width and height."
    width, height = (int(n) for n in draw.integers(*sides, 2))
    small = Image.fromarray(draw.integers(0, 256, (height//6 + 1, width//6 + 1, 3), dtype=np.uint8))
    pixels = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    if synthetic: pixels = pixels + 24*((np.indices((height, width)).sum(0) % 2)*2 - 1)[..., None]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path, **({"quality": 92} if path.suffix in (".jpg", ".JPEG") else {}))
    return width, height


def make_corvi(folder: Path, each: int = 2, sides: tuple[int, int] = (60, 110), seed: int = 0) -> tuple[Path, Path, Path]:
    "Write pictures, lists and crop list; `each` synthetic images a generator, twice as many reals a source. Images, lists, crop list."
    draw, images, lists = np.random.default_rng([seed, 1]), folder/"TestSet", folder/"lists"
    lists.mkdir(parents=True)
    names = {f"{f}/{f}_{i:03d}.png": (1, code) for f, code in CORVI_FOLDERS.items() for i in range(each)}
    names["dalle_2/DALL·E 2022-10-23 - Tube of orange and pears, surrounded by boxes.png"] = (1, 7) # prompts are file names
    names |= {f"{f}/{i:05d}.{suffix}": (0, 0) for f, suffix in REAL_FOLDERS.items() for i in range(2*each)}
    rows = []
    for name, (origin, _) in names.items():
        width, height = picture(images/name, draw, origin == 1, sides)
        side = int(draw.integers(20, min(width, height) + 1))
        rows.append((name, side, draw.integers(width - side + 1), draw.integers(height - side + 1), draw.integers(65, 101)))
    rows.append(("biggan_512/not_listed.png", 99, 0, 0, 80)) # the crop list knows more pictures than the paper's list
    with open(folder/"operations.csv", "w", newline="") as file:
        csv.writer(file).writerows([("filename", "cropsize", "x", "y", "qf"), *rows])
    (lists/"annotations_corvi.txt").write_text("".join(f"{n},{o},{g}\n" for n, (o, g) in names.items()))
    synthetic, real = ([n for n, (o, _) in names.items() if o == which] for which in (1, 0))
    chosen = [f"{n},1\n" for n in synthetic[::each]] + [f"{n},0\n" for n in real[:len(synthetic[::each])]]
    (lists/"annotations_calib_corvi.txt").write_text("".join(chosen))
    (lists/"anchor_lasted_corvi.txt").write_text("".join(f"{n},0\n" for n in real[::2]))
    return images, lists, folder/"operations.csv"


def make_practical(folder: Path, each: int = 3, sides: tuple[int, int] = (60, 110), seed: int = 0) -> tuple[Path, Path]:
    "Write pictures and the six lists, each half real; half of a list's reals stand in the next one too. Images, lists."
    draw, images, lists = np.random.default_rng([seed, 2]), folder/"data", folder/"lists"
    lists.mkdir(parents=True, exist_ok=True)
    reals = [f"AIDraw_1122/Real/artist{i % 4}/{i}.jpg" for i in range(each*(len(PRACTICAL_FOLDERS) + 1))]
    for name in reals: picture(images/name, draw, False, sides)
    chosen, listed = {}, []
    for k, (title, place) in enumerate(PRACTICAL_FOLDERS.items()):
        fakes = [f"AIDraw_1122/Fake/{place}/{i}.{'png' if i % 2 else 'jpg'}" for i in range(each)]
        for name in fakes: picture(images/name, draw, True, sides)
        mine = reals[k*each//2:k*each//2 + each]
        listed += mine
        (lists/f"Test_{title}_num{2*each}.txt").write_text("".join([f"{n} 1\n" for n in fakes] + [f"{n} 0\n" for n in mine]))
        chosen |= {f"{fakes[0]} 1\n": 1, f"{mine[0]} 0\n": 0} # a real of two lists is named once
    (lists/"annotations_calib_practical.txt").write_text("".join(chosen))
    (lists/"anchor_lasted_practical.txt").write_text("".join(f"{n} 0\n" for n in sorted(set(listed))[::3]))
    return images, lists
