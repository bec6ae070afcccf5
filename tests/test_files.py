"""Files as people have them: what is read, what is refused and in which words, and what a file says about its origin."""
import datetime
import io
import json
import multiprocessing
import re
import resource
import struct
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from imaginet_nb.apps.predict import TOO_SMALL_NOTE
from imaginet_nb.audit.files import image_properties
from imaginet_nb.core import rng
from imaginet_nb.data.corruptions import Perturb
from imaginet_nb.data.images import ImageError, NotAnImage, decode, longer_side, open_image, opened, read_image, walk, why_no_image
from imaginet_nb.data.imaginet import verify
from imaginet_nb.data.manifest import MANIFEST_COLUMNS
from imaginet_nb.data.packed import Store
from imaginet_nb.data.perturbed import make_testset
from imaginet_nb.data.provenance import ABSENT, EMPTY, INVALID, PRESENT, VALID, Provenance, read_provenance
from imaginet_nb.data.splits import write_annotations

Y, X = np.mgrid[0:120, 0:160]
PIXELS = np.stack([X*255/160, Y*255/120, (X + Y) % 256], -1).astype(np.uint8)
PICTURE, FLOATS = Image.fromarray(PIXELS), Image.fromarray(PIXELS[..., 0].astype(np.float32)/255)


def written(format: str = "PNG", picture: Image.Image = PICTURE, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def text(key: str, value: str, **options) -> bytes:
    "A PNG with a text chunk."
    info = PngImagePlugin.PngInfo()
    info.add_text(key, value, **options)
    return written(pnginfo=info)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def inside(png: bytes, *chunks: bytes) -> bytes:
    "The PNG with further chunks behind its header."
    return png[:33] + b"".join(chunks) + png[33:]


# --- metadata that is too large

PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
LARGE = {"workflow": text("workflow", "{}"*700_000, zip=True), "ICC Profile": written(icc_profile=PROFILE + bytes(1_500_000)),
         "XMP": inside(written(), chunk(b"iTXt", b"XMP\0\1\0\0\0" + zlib.compress(bytes(1_500_000)))),
         "bomb": inside(written(), chunk(b"zTXt", b"bomb\0\0" + zlib.compress(bytes(200_000_000), 1)))}


@pytest.mark.parametrize("key", LARGE)
def test_pixels_do_not_depend_on_large_metadata(key):
    # fails for: Pillow's "Decompressed data too large", a bound that is lifted altogether
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = read_image(LARGE[key])
    assert np.array_equal(found.pixels, PIXELS) and found.notes == (f"metadata too large to read: {key}",)
    assert longer_side(LARGE[key]) == 160
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000 # KB: 200 MB are not inflated


def test_many_small_texts_are_left_out_from_a_total_on(monkeypatch):
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 5_000_000) # 64 MB otherwise
    piece = chunk(b"zTXt", b"piece\0\0" + zlib.compress(bytes(1_000_000)))
    found = read_image(inside(written(), *[piece]*8))
    assert np.array_equal(found.pixels, PIXELS) and found.notes[0].count("piece") == 3


def test_the_checksums_of_a_mended_png_are_compared():
    # fails for: a copy without the large chunks whose other chunks nobody looks at
    content = bytearray(LARGE["workflow"])
    content[content.rindex(b"IDAT") + 100] ^= 1
    with pytest.raises(ImageError, match="damaged image"): decode(bytes(content))


# --- ends that are missing

LOST_END = "the end of the file is missing, but all pixels are present"
JPEGS = {"plain": {}, "grey": {}, "4:4:4": {"subsampling": 0}, "optimised": {"optimize": True}, "progressive": {"progressive": True},
         "restarts": {"restart_marker_rows": 1}}


@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_without_its_end_marker_is_read_and_one_without_pixels_is_not(name):
    # fails for: refusing what is complete; grey rows, or missing scans of a progressive file, taken for pixels
    noise = np.random.default_rng(0).integers(0, 256, PIXELS.shape, dtype=np.uint8)//8 + PIXELS//2
    content = written("JPEG", Image.fromarray(noise).convert("L" if name == "grey" else "RGB"), quality=85, **JPEGS[name])
    found = read_image(content[:-2])
    assert np.array_equal(found.pixels, decode(content)) and found.notes == ("the end of the file is missing, but all pixels are present",)
    assert np.array_equal(decode(content[:-1]), found.pixels)
    for missing in (12, 60, 700, len(content)//2):
        with pytest.raises(ImageError, match="cut off: .* rows of pixels are missing|image file is truncated"): decode(content[:-missing])
    scans = [match.start() for match in re.finditer(b"\xff\xda", content)]
    for start in scans[1:]:
        with pytest.raises(ImageError, match="damaged image"): decode(content[:start]) # whole scans are missing


@pytest.mark.parametrize("subsampling", [0, 2])
def test_a_jpeg_that_lacks_a_few_bytes_more_is_not_called_complete(subsampling):
    # fails for: missing bits that decode like the zeros in their place, a last byte 255 without its 0, a note that Pillow decides on
    for picture in (PICTURE, PICTURE.convert("L")):
        for quality in range(40, 96, 15):
            content = written("JPEG", picture, quality=quality, subsampling=subsampling)
            found = read_image(content[:-2])
            assert np.array_equal(found.pixels, decode(content)) and found.notes == (LOST_END,)
            assert read_image(content).notes == read_image(content + b"behind").notes == ()
            for missing in range(4, 40): # the last byte may hold nothing but filling bits
                with pytest.raises(ImageError, match="of 120 rows of pixels are missing"): decode(content[:-missing])


def test_the_error_says_how_many_rows_are_missing():
    content = written("JPEG", quality=92)
    counts = []
    for share in (0.9, 0.7, 0.5):
        with pytest.raises(ImageError, match=r"cut off: \d+ of 120 rows of pixels are missing") as caught:
            decode(content[:int(share*len(content))])
        counts.append(int(re.search(r"cut off: (\d+)", str(caught.value))[1]))
    assert counts == sorted(counts) and 1 <= counts[0] < counts[-1] <= 120


@pytest.mark.parametrize("cut", [12, 11, 8, 4, 1])
def test_a_png_without_its_end_chunk_is_read(cut):
    content = written()
    assert np.array_equal(decode(content[:-cut]), PIXELS)
    behind = content[:-12] + chunk(b"tEXt", b"Comment\0behind the pixels")
    assert read_image(behind[:-9]).notes == ("the end of the file is missing, but all pixels are present",)
    for missing in (13, 16, 30):
        with pytest.raises(ImageError, match="damaged image"): decode(content[:-missing])


# --- phones

def tall_jpeg(width: int, height: int, picture: Image.Image) -> bytes:
    "A JPEG of any height: the rows of blocks of a picture 16 pixels high, repeated between restart markers."
    content = written("JPEG", picture.resize((width, 16)), quality=50, restart_marker_rows=1)
    frame, scan = content.index(b"\xff\xc0"), content.index(b"\xff\xda")
    first = scan + 2 + struct.unpack(">H", content[scan + 2:scan + 4])[0]
    head = content[:frame + 5] + struct.pack(">H", height) + content[frame + 7:first]
    blocks = content[first:-2]
    return head + b"".join(blocks + bytes([0xff, 0xd0 + row % 8]) for row in range(height//16))[:-2] + b"\xff\xd9"


def memory() -> dict[str, int]:
    "Bytes of this process, by the names of Linux."
    return {name: 1024*int(value) for name, value in re.findall(r"(Vm\w+):\s+(\d+)", Path("/proc/self/status").read_text())}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measures memory as Linux reports it")
def test_200_megapixels_are_read_in_bounded_memory():
    # fails for: Pillow's limit, more than one copy of all pixels, a picture turned as a whole
    content = tall_jpeg(16_320, 12_240, PICTURE)
    limit = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (memory()["VmSize"] + 8*16_320*12_240, limit[1])) # 8 bytes per pixel
    try: found = read_image(content)
    finally: resource.setrlimit(resource.RLIMIT_AS, limit)
    assert found.pixels.shape == (12_240, 16_320, 3) and found.notes == () and longer_side(content) == 16_320
    small = decode(written("JPEG", PICTURE.resize((16_320, 16)), quality=50, restart_marker_rows=1))
    for top in (0, 6_000, 12_224): # full resolution; rows at the edge of a strip are blended with the next one's colours
        assert np.array_equal(found.pixels[top + 1:top + 15], small[1:15])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the readers inherit what is patched here")
def test_one_large_picture_at_a_time_is_read_by_all_processes(tmp_path, monkeypatch):
    # fails for: a bound within each process, a lock that a killed reader keeps
    from imaginet_nb.apps import predict
    from imaginet_nb.data import images
    load, entered = images._load, multiprocessing.get_context("fork").Event()
    def slow(*picture):
        start = time.monotonic()
        time.sleep(0.1)
        with open(tmp_path/"spans", "a") as file: file.write(f"{start} {time.monotonic()}\n")
        return load(*picture)
    def stuck(*picture):
        entered.set()
        time.sleep(60)
    monkeypatch.setattr(images, "_LARGE", 0)
    monkeypatch.setattr(images, "_load", stuck)
    reader = multiprocessing.get_context("fork").Process(target=decode, args=(written(),))
    reader.start()
    assert entered.wait(30)
    reader.kill()
    reader.join()
    monkeypatch.setattr(images, "_load", slow)
    paths = [tmp_path/f"{k}.png" for k in range(4)]
    for path in paths: path.write_bytes(written())
    start = time.monotonic()
    assert all(row.get("error") is None for row in predict.score_files(paths, predict.Scorer(Mean()), readers=2))
    assert time.monotonic() - start < 30
    spans = sorted(tuple(map(float, line.split())) for line in (tmp_path/"spans").read_text().splitlines())
    assert len(spans) == 4 and all(end <= begin for (_, end), (begin, _) in zip(spans, spans[1:]))


def test_a_picture_above_the_limit_is_refused_with_the_name_of_the_option(monkeypatch):
    content = tall_jpeg(1600, 1200, PICTURE)
    monkeypatch.setenv("IMAGINET_MAX_PIXELS", str(1600*1200 - 1))
    with pytest.raises(ImageError, match="1600x1200 pixels are more than .* set IMAGINET_MAX_PIXELS=1920000"): decode(content)
    monkeypatch.setenv("IMAGINET_MAX_PIXELS", str(1600*1200))
    assert decode(content).shape == (1200, 1600, 3)
    monkeypatch.delenv("IMAGINET_MAX_PIXELS")
    header = struct.pack(">IIBBBBB", 16_000, 16_000, 8, 2, 0, 0, 0)
    with pytest.raises(ImageError, match="16000x16000 pixels are more than max_pixels=250000000"):
        decode(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"x") + chunk(b"IEND", b""))
    assert Image.MAX_IMAGE_PIXELS == 89_478_485 # Pillow's own limit holds for everybody else


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientations_are_those_of_pillow_and_others_are_no_note(format):
    from PIL import ImageOps
    for orientation in range(10):
        exif = Image.Exif()
        exif[0x0112] = orientation
        content = written(format, PICTURE.crop((0, 0, 160, 90)), exif=exif)
        found = read_image(content)
        assert np.array_equal(found.pixels, np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")))
        assert found.notes == (("turned upright by its EXIF record",) if 2 <= orientation <= 8 else ())


def test_strips_are_joined_without_a_seam():
    tall = np.random.default_rng(0).integers(0, 256, (900, 700, 4), dtype=np.uint8)
    for mode, orientation in (("RGBA", 1), ("RGB", 6), ("LA", 7), ("P", 3)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture = Image.fromarray(tall).convert(mode)
        whole = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA")).convert("RGB")
        turn = {1: None, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 3: Image.Transpose.ROTATE_180}[orientation]
        assert np.array_equal(decode(written(picture=picture, exif=exif)), np.asarray(whole if turn is None else whole.transpose(turn)))


def test_a_gain_map_is_a_note_and_the_file_a_jpeg():
    content = written("MPO", save_all=True, append_images=[PICTURE.resize((40, 30)).convert("L")], quality=90)
    found, audited = read_image(content), image_properties(content)
    assert (audited["format"], audited["jpeg_quality"], audited["error"]) == ("JPEG", 90, None)
    assert found.format == "JPEG" and found.notes == ("the main picture; a gain map, preview or second view follows it",)
    assert np.array_equal(found.pixels, decode(written("JPEG", quality=90)))


@pytest.mark.filterwarnings("error")
def test_a_broken_exif_record_is_silent(capfd):
    content = written("JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert np.array_equal(decode(content), decode(written("JPEG"))) and capfd.readouterr() == ("", "")


def test_heic_is_found_by_any_of_its_brands():
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    content = bytearray(written("HEIF"))
    content[8:12] = b"mif1"
    assert read_image(bytes(content)).format == "HEIF" and decode(bytes(content)).shape == PIXELS.shape
    avif = bytearray(written("AVIF"))
    avif[8:12] = b"mif1"
    assert read_image(bytes(avif)).format == "AVIF"


# --- what is no picture, or not for this reader

OTHERS = {"web_page.jpg": (b"<!DOCTYPE html><html>403 Forbidden</html>", "a web page, so its download failed"),
          "lfs_pointer.jpg": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1\n", "git lfs pull"),
          "drawing.svg": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing"),
          "denied.png": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "an XML document"),
          "refused.jpg": (b'{"error": "Access to this dataset is restricted"}', "a text in JSON, perhaps the error message"),
          "video.mp4": (b"\0\0\0\x18ftypmp42" + bytes(200), "a video: .*ffmpeg"), "video.webm": (b"\x1aE\xdf\xa3" + bytes(20), "a video"),
          "paper.pdf": (b"%PDF-1.7\n", "a PDF"), "layers.psd": (b"8BPS\0\1", "Photoshop"),
          "many.zip": (b"PK\3\4" + bytes(20), "an archive"), "MANY.TAR": (bytes(257) + b"ustar\0" + bytes(249), "an archive: unpack it"),
          "many.parquet": (b"PAR1" + bytes(20) + b"PAR1", "a Parquet file in which no pictures are found: .*end in .parquet"),
          "._cat.jpg": (b"\0\5\x16\7" + bytes(80), "a macOS metadata file"), "table.csv": (b"path,origin\n", "or damaged at its beginning")}
UNREAD = {"raw.cr2": (b"II*\0\x10\0\0\0CR\2\0" + bytes(200), "a camera raw file: develop it"),
          "raw.cr3": (b"\0\0\0\x18ftypcrx " + bytes(200), "a camera raw file"), "raw.raf": (b"FUJIFILMCCD-RAW 0201", "a camera raw file"),
          "preview.dng": (written("TIFF", tiffinfo={254: 1}), "a camera raw file"),
          "codestream.jxl": (b"\xff\x0a" + bytes(300), "JPEG XL"), "container.jxl": (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(300), "JPEG XL")}


@pytest.mark.parametrize("name", OTHERS | UNREAD)
def test_what_is_no_picture_is_named_with_a_remedy(name, tmp_path):
    # fails for: "not an image" and no more; the small preview of a raw file taken for the picture; raw pictures left out in silence
    content, words = (OTHERS | UNREAD)[name]
    (tmp_path/name).write_bytes(content)
    with pytest.raises(ImageError, match=words) as caught: decode(tmp_path/name)
    assert str(caught.value).startswith(f"{tmp_path/name}: ")
    with pytest.raises(ImageError), opened(tmp_path/name) as stream:
        with pytest.raises(ImageError) as kind: open_image(stream)
        assert isinstance(kind.value, NotAnImage) == (name in OTHERS)
        raise kind.value
    pictures = ("web_page.jpg", "lfs_pointer.jpg", "denied.png", "refused.jpg", *UNREAD) # by name or content: they have a row
    assert {found.path.name: why_no_image(found.path) is None for found in walk(tmp_path)} == {name: name in pictures}


def test_without_its_package_heic_says_which(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match="pip install pillow-heif"): decode(b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(50))
    monkeypatch.setitem(sys.modules, "pillow_jxl", None)
    with pytest.raises(ImageError, match="pip install pillow-jxl-plugin"): decode(UNREAD["codestream.jxl"][0])


# --- what a file says about its origin

def exif(tag: int, value: str | bytes) -> Image.Exif:
    record = Image.Exif()
    record[0x0132] = "2026:01:01 00:00:00" # some writers leave out a record whose first part is empty
    (record.get_ifd(0x8769) if tag > 0x9000 else record)[tag] = value
    return record


SETTINGS = "a fox\nNegative prompt: blur\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1"
TERM = "http://cv.iptc.org/newscodes/digitalsourcetype/"
XMP = b'<rdf:Description Iptc4xmpExt:DigitalSourceType="' + TERM.encode() + b'%s"/>'
IPTC = b"Photoshop 3.0\x008BIM\x04\x04\0\0" + (23).to_bytes(4, "big") + b"\x1c\x02\x6e\0\x12Made by DALL-E 3  \0"
SAYS = {
    "parameters": (text("parameters", SETTINGS), "PNG text parameters: Steps: 20, Sampler"),
    "compressed": (text("parameters", SETTINGS, zip=True), "PNG text parameters: Steps: 20, Sampler"),
    "only a key": (text("Dream", "a fox"), "PNG text Dream: a fox"),
    "large workflow": (LARGE["workflow"], "PNG text workflow: " + "{}"*20),
    "behind the pixels": (written()[:-12] + chunk(b"tEXt", b"Software\0NovelAI") + written()[-12:], "PNG text Software: NovelAI"),
    "utf-16 BE": (written("JPEG", exif=exif(0x9286, b"UNICODE\0" + SETTINGS.encode("utf-16-be"))), "EXIF user comment: Steps: 20, Sampler"),
    "utf-16 LE": (written("WEBP", exif=exif(0x9286, b"UNICODE\0" + SETTINGS.encode("utf-16-le"))), "EXIF user comment: Steps: 20, Sampler"),
    "ascii": (written("AVIF", exif=exif(0x9286, b"ASCII\0\0\0" + SETTINGS.encode())), "EXIF user comment: Steps: 20, Sampler"),
    "ComfyUI": (written("WEBP", exif=exif(0x0110, 'prompt: {"3": {}}')), "EXIF model: prompt: {"),
    "EXIF of a PNG": (written(exif=exif(0x0131, "Adobe Firefly 3")), "EXIF software: Adobe Firefly"),
    "program": (written("TIFF", exif=exif(0x0131, "FLUX.1 dev")), "EXIF software: FLUX"),
    "Midjourney": (text("Description", "a fox --v 6 Job ID: 01234567-89ab-cdef-0123-456789abcdef"),
                   "PNG text Description: Job ID: 01234567-89ab"),
    "made": (written("JPEG", xmp=XMP % b"trainedAlgorithmicMedia"), "XMP: trainedAlgorithmicMedia"),
    "edited": (written("WEBP", xmp=XMP % b"compositeWithTrainedAlgorithmicMedia"), "XMP: compositeWithTrainedAlgorithmicMedia"),
    "XMP of a PNG": (inside(written(), chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP % b"trainedAlgorithmicMedia")),
                     "XMP: trainedAlgorithmicMedia"),
    "IPTC": ((plain := written("JPEG"))[:2] + b"\xff\xed" + (len(IPTC) + 2).to_bytes(2, "big") + IPTC + plain[2:], "IPTC: DALL-E"),
    "camera": (written("JPEG", xmp=XMP % b"digitalCapture", exif=exif(0x010F, "Canon")), ""),
    "words in a description": (text("Description", "influx of imagen, flux and gemini"), ""),
    "broken EXIF": (written("JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), ""), "nothing": (written("WEBP"), "")}


@pytest.mark.parametrize("name", SAYS)
def test_what_names_a_generator_is_found_and_nothing_else(name):
    # fails for: text that is compressed, large, UTF-16 or behind the pixels; words that mean something else; decoding for a header
    content, says = SAYS[name]
    assert read_provenance(content) == Provenance(says, ABSENT, "")
    assert read_provenance(content).text == (says or None)


def test_a_line_of_a_table_holds_what_a_file_says():
    found = read_provenance(text("parameters", "a\tfox\r\n\x1b[31m" + "x"*5000)).text
    assert found.isprintable() and len(found) < 80


FORMATS = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "AVIF": "image/avif", "HEIF": "image/heic", "TIFF": "image/tiff"}


@pytest.fixture(scope="module")
def signer():
    "A signer with a certificate of its own, which no trust list holds."
    c2pa = pytest.importorskip("c2pa")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    begin, keys = datetime.datetime.now(datetime.UTC) - datetime.timedelta(1), [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name), x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "Tests")])
             for name in ("Self-made root", "Self-made signer")]
    chain = b""
    for k in (1, 0): # the signer's, then that of the root, which signs both
        no = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only", "decipher_only")
        made = x509.CertificateBuilder(names[0], names[k], keys[k].public_key(), k + 1, begin, begin + datetime.timedelta(30))
        made = made.add_extension(x509.BasicConstraints(k == 0, None), True)
        made = made.add_extension(
            x509.KeyUsage(digital_signature=k == 1, key_cert_sign=k == 0, crl_sign=k == 0, **dict.fromkeys(no, False)), True)
        made = made.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[0].public_key()), False)
        if k: made = made.add_extension(x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.EMAIL_PROTECTION]), False)
        chain += made.sign(keys[0], hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    key = keys[1].private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return c2pa.Signer.from_info(c2pa.C2paSignerInfo(c2pa.C2paSigningAlg.ES256, chain, key, None))


def signed(content: bytes, format: str, signer) -> bytes:
    "The picture with a manifest that says that a model made it."
    import c2pa
    created = {"action": "c2pa.created", "digitalSourceType": TERM + "trainedAlgorithmicMedia"}
    manifest = {"claim_generator_info": [{"name": "Tests"}], "assertions": [{"label": "c2pa.actions", "data": {"actions": [created]}}]}
    settings = {"builder": {"thumbnail": {"enabled": False}}}
    made = io.BytesIO()
    c2pa.Builder(json.dumps(manifest), context=c2pa.Context.from_dict(settings)).sign(signer, FORMATS[format], io.BytesIO(content), made)
    return made.getvalue()


@pytest.mark.parametrize("format", FORMATS)
def test_a_manifest_is_valid_until_a_byte_of_the_picture_changes(format, signer, monkeypatch):
    # fails for: a manifest believed unread, one not found in its format, pixels that changed with it
    if format == "HEIF": pytest.importorskip("pillow_heif").register_heif_opener()
    plain = written(format)
    content = signed(plain, format, signer)
    found = read_provenance(content)
    assert found == Provenance("C2PA manifest: trainedAlgorithmicMedia", VALID, "Self-made signer, Tests") and found.has_manifest
    assert "signed by Self-made signer" in found.text and "not compared with a trust list" in found.text
    assert np.array_equal(decode(content), decode(plain))
    changed, middle = bytearray(content), len(plain)//2
    changed[content.index(plain[middle:middle + 16])] ^= 1
    assert read_provenance(bytes(changed)) == Provenance(found.generator, INVALID, "")
    assert read_provenance(content, verify=False).c2pa == PRESENT
    monkeypatch.setitem(sys.modules, "c2pa", None)
    assert read_provenance(content) == Provenance(found.generator, PRESENT, "")


def test_a_place_for_a_manifest_is_no_manifest():
    hello = inside(written(), chunk(b"caBX", b"hello"))
    assert read_provenance(hello) == Provenance("", EMPTY, "") and not read_provenance(hello).has_manifest
    store = struct.pack(">I4sI4s", 40, b"jumb", 32, b"jumd") + bytes.fromhex("6332706100110010800000aa00389b71") + b"\3c2pa\0"
    found = read_provenance(inside(written(), chunk(b"caBX", store)))
    assert found.c2pa in (INVALID, PRESENT) and found.has_manifest # the latter without `c2pa-python`
    segment = b"JP\0\1\0\0\0\1" + struct.pack(">I4sI4s", 40, b"jumb", 32, b"jumd") + b"another standard" + b"\3name\0"
    other = (plain := written("JPEG"))[:2] + b"\xff\xeb" + struct.pack(">H", len(segment) + 2) + segment + plain[2:]
    assert read_provenance(other) == Provenance("", ABSENT, "")


# --- in `imaginet predict`

class Mean:
    name, input_size, tracks = "Mean", 24, ("detection",)
    def score(self, images): return images.float().mean((1, 2, 3)) - 128


def test_predict_says_what_a_file_says_and_does_not_judge_what_is_too_small(tmp_path):
    # fails for: a score that metadata change, a verdict on a pixel
    from imaginet_nb.apps import predict
    contents = {"plain.png": written(), "says.png": text("parameters", SETTINGS), "large.png": LARGE["workflow"], "gain.jpg":
                written("MPO", save_all=True, append_images=[PICTURE.resize((40, 30)).convert("L")]), "cut.jpg": written("JPEG")[:-700],
                "dot.png": written(picture=PICTURE.crop((0, 0, 1, 1))), "line.png": written(picture=PICTURE.resize((3000, 2))),
                "strip.png": written(picture=PICTURE.resize((400, 1))), "float.tif": written("TIFF", FLOATS),
                "icon.png": written(picture=PICTURE.crop((0, 0, 16, 16))), "page.jpg": b"<html>404</html>"}
    for name, content in contents.items(): (tmp_path/name).write_bytes(content)
    scorer = predict.Scorer(Mean())
    rows = dict(zip(contents, predict.score_files([tmp_path/name for name in contents], scorer, 0), strict=True))
    assert rows["says.png"]["provenance"] == SAYS["parameters"][1] and rows["plain.png"]["provenance"] is None
    assert rows["large.png"]["provenance"].startswith("PNG text workflow: ") and "too large to read: workflow" in rows["large.png"]["note"]
    same = ("logit", "probability", "verdict", "reason", "width", "height", "format")
    for name in ("says.png", "large.png"): assert [rows[name][key] for key in same] == [rows["plain.png"][key] for key in same]
    assert rows["gain.jpg"]["format"] == "JPEG" and "gain map" in rows["gain.jpg"]["note"]
    for name in ("dot.png", "line.png", "strip.png"):
        assert rows[name]["verdict"] == "unsure" and "too small to judge" in rows[name]["reason"] and "family" not in rows[name]
    assert rows["icon.png"]["verdict"] in ("real", "synthetic") and "too small" not in (rows["icon.png"]["reason"] or "")
    with pytest.raises(ImageError, match="float.tif: .*floating-point"): read_image(tmp_path/"float.tif")
    assert "floating-point" in rows["float.tif"]["error"] and rows["float.tif"].get("logit") is None
    assert "rows of pixels are missing" in rows["cut.jpg"]["error"] and "a web page" in rows["page.jpg"]["error"]
    assert "provenance" in predict.SCORE_COLUMNS
    from imaginet_nb.apps.predict_page import card
    shown = str(card(scorer, 0, {column: rows["says.png"].get(column) for column in predict.SCORE_COLUMNS}))
    assert "can be removed or forged, unless verified" in shown and "Sampler" in shown


MEAN = """
import torch
class Mean: # of the pixels, with more weight the lower they are, so that a picture that is turned has another
    name, input_size = "Mean", {side}
    def score(self, images): return (images.float()*torch.linspace(0, 2, images.shape[2])[:, None]).mean((1, 2, 3)) - 128
"""


@pytest.fixture
def imaginet(tmp_path, monkeypatch, without_figures):
    "Runs a command in a folder with a detector that gives the mean of the pixels."
    from typer.testing import CliRunner

    from imaginet_nb.apps.cli import app
    monkeypatch.chdir(tmp_path)
    def run(*words):
        monkeypatch.delitem(sys.modules, "mean", raising=False) # a process of its own has not imported it
        return CliRunner().invoke(app, [str(word) for word in words])
    return run


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measures memory as Linux reports it")
def test_the_command_scores_200_megapixels_in_bounded_memory(imaginet, tmp_path):
    # fails for: a limit of its own, all pixels as floats, a score of the picture reduced
    (tmp_path/"mean.py").write_text(MEAN.format(side=24))
    strip = np.full((16, 16_320, 3), 128, np.uint8) # its ends and its middle are shown, at full resolution
    strip[:, :32], strip[:, 8144:8176], strip[:, -32:] = 0, 255, 200
    (tmp_path/"phone.jpg").write_bytes(tall_jpeg(16_320, 12_240, Image.fromarray(strip)))
    (tmp_path/"small.png").write_bytes(written())
    words = ("--detector", "mean:Mean", "--device", "cpu", "--out", "table.csv")
    assert imaginet("predict", "small.png", *words).exit_code == 0 # what is imported is not counted
    limit = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (memory()["VmSize"] + 8*16_320*12_240, limit[1])) # 8 bytes per pixel
    try: result = imaginet("predict", "phone.jpg", *words)
    finally: resource.setrlimit(resource.RLIMIT_AS, limit)
    assert result.exit_code == 0, result.output
    row, = pd.read_csv(tmp_path/"table.csv").to_dict("records")
    assert (row["width"], row["height"], row["format"], row["crops"]) == (16_320, 12_240, "JPEG", 5) and pd.isna(row["error"])
    means = np.array([255, 0, 0, 200, 200]) - 128
    assert row["logit"] == pytest.approx(means.mean(), abs=2) and row["crop_spread"] == pytest.approx(means.std(ddof=1), abs=2)


# --- in all commands

def kinds() -> dict[str, tuple[bytes, str]]:
    "Name -> content; note that its pixels have, or why it has none."
    frames = dict(save_all=True, append_images=[PICTURE.point(lambda value: value // 2)])
    turned, unknown = Image.Exif(), Image.Exif()
    turned[0x0112], unknown[0x0112] = 6, 99
    grey = Image.fromarray(PIXELS[..., 0].astype(np.uint16)*257)
    jpeg = written("JPEG")
    found = {
        "plain.png": (written(), ""), "plain.avif": (written("AVIF"), ""), "gray16.png": (written(picture=grey), ""),
        "gray16.tif": (written("TIFF", grey), ""), "cmyk.jpg": (written("JPEG", PICTURE.convert("CMYK")), ""),
        "bilevel.png": (written(picture=PICTURE.convert("1")), ""), "lab.tif": (written("TIFF", PICTURE.convert("LAB")), ""),
        "la.png": (written(picture=PICTURE.convert("LA")), ""), "palette.png": (written(picture=PICTURE.convert("P"), transparency=0), ""),
        "alpha.png": (written(picture=Image.fromarray(np.dstack([PIXELS, PIXELS[..., 0]]))), ""),
        "icc_garbage.jpg": (written("JPEG", icc_profile=b"not an icc profile"), ""), "exif_broken.jpg": (
            written("JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), ""), "motion_photo.jpg": (jpeg + b"MotionPhoto_Data" + bytes(5000), ""),
        "orientation_6.jpg": (written("JPEG", exif=turned), "turned upright by its EXIF record"),
        "orientation_99.jpg": (written("JPEG", exif=unknown), ""), "trailing_bytes.png": (written() + bytes(range(100)), ""),
        "animated.gif": (written("GIF", **frames), "first of 2 frames"), "animated.png": (written(**frames), "first of 2 frames"),
        "animated.webp": (written("WEBP", **frames), "first of 2 frames"), "gain_map.jpg": (
            written("MPO", save_all=True, append_images=[PICTURE.resize((40, 30)).convert("L")]), "gain map, preview or second view"),
        "large_text.png": (LARGE["workflow"], "metadata too large to read: workflow"),
        "large_profile.png": (LARGE["ICC Profile"], "metadata too large to read: ICC Profile"),
        "no_end_marker.jpg": (jpeg[:-2], LOST_END), "no_iend.png": (written()[:-12], LOST_END), "webp_called.jpg": (written("WEBP"), ""),
        "png_called.JPEG": (written(), ""), "parameters.png": (SAYS["parameters"][0], "")}
    try:
        import pillow_heif
        pillow_heif.register_heif_opener()
        found["phone.heic"] = written("HEIF"), ""
    except ImportError: pass
    return found


BROKEN = {"cut.jpg": (written("JPEG")[:-700], "rows of pixels are missing"), "cut.png": (written()[:-60], "damaged image"),
          "float.tif": (written("TIFF", FLOATS), "floating-point"), "empty.png": (b"", "empty file"),
          **{name: OTHERS[name] for name in ("web_page.jpg", "lfs_pointer.jpg")}, **UNREAD}
SMALL = {"dot.png": (1, 1), "line.png": (3000, 2), "strip.png": (400, 1)}
NO_PICTURES = ("drawing.svg", "video.mp4", "paper.pdf")
PERTURB = Perturb(size=32)


def test_every_kind_of_file_has_the_same_pixels_or_the_same_reason_in_all_commands(imaginet, tmp_path):
    # fails for: a command with a reader of its own, a file without a row, another frame, colour or orientation, a reason that is lost
    (tmp_path/"mean.py").write_text(MEAN.format(side=None)) # is shown the whole picture
    good = kinds()
    contents = {name: content for name, (content, _) in (good | BROKEN).items()}
    contents |= {name: written(picture=PICTURE.resize(shape)) for name, shape in SMALL.items()}
    paths = {name: ("real/", "synthetic/SD v2.1/")[k % 2] + name for k, name in enumerate(contents)}
    for name, content in contents.items():
        (tmp_path/"set"/paths[name]).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/"set"/paths[name]).write_bytes(content)
    for name in NO_PICTURES: (tmp_path/"set"/"real"/name).write_bytes(OTHERS[name][0])
    words = ("--detector", "mean:Mean", "--device", "cpu", "--out")
    runs = {"predict": imaginet("predict", "set", *(f"set/real/{name}" for name in NO_PICTURES), "--no-views", *words, "p.csv"),
            "evaluate": imaginet("evaluate", "--root", "set", "--workers", 0, *words, "measured"),
            "audit": imaginet("audit", "set", "--out", "audited")}
    for name, result in runs.items(): assert result.exit_code == 0, (name, result.output)
    tables = {"predict": pd.read_csv(tmp_path/"p.csv").assign(path=lambda frame: frame["path"].str.removeprefix("set/")),
              "evaluate": pd.read_csv(tmp_path/"measured"/"predictions.csv"), "audit": pd.read_csv(tmp_path/"audited"/"properties.csv")}
    tables = {name: frame.set_index("path") for name, frame in tables.items()}
    predicted, evaluated, audited = tables.values()
    assert set(evaluated.index) == set(audited.index) == set(paths.values())
    assert set(predicted.index) == {*paths.values(), *(f"real/{name}" for name in NO_PICTURES)}
    for name in NO_PICTURES: assert re.search(OTHERS[name][1], predicted.loc[f"real/{name}", "error"])
    for name in ("evaluate", "audit"): assert "by name and content they are not images: 3" in " ".join(runs[name].output.split())

    labels = ("synthetic", "photos", "SD", "SD v2.1", "train")
    noted = [note for _, note in good.values() if note]
    for text in (" ".join(runs["evaluate"].output.split()), (tmp_path/"measured"/"index.html").read_text()):
        assert f"with a note on their file: {len(noted)}; " in text
        assert f"{LOST_END} (2)" in text and "metadata too large to read (2)" in text and "first of several frames (3)" in text
    listed = pd.DataFrame([(paths[name], *labels) for name in (*good, *SMALL)], columns=MANIFEST_COLUMNS)
    listed.to_csv(tmp_path/"good.csv", index=False)
    assert imaginet("data", "pack", "set", "--list", "good.csv", "--out", "store").exit_code == 0
    store = Store(tmp_path/"store")
    for name, (content, note) in good.items():
        pixels, path = decode(content), paths[name]
        score = (pixels*np.linspace(0, 2, len(pixels))[:, None, None]).mean() - 128
        assert np.array_equal(store[path][:, :], pixels), name
        for frame in (predicted, evaluated): assert frame.loc[path, "logit"] == pytest.approx(score, abs=0.01), name
        assert tuple(predicted.loc[path, ["height", "width"]]) == pixels.shape[:2], name
        assert audited.loc[path, "pixel_hash"] == image_properties(written(picture=Image.fromarray(pixels)))["pixel_hash"], name
        for frame in tables.values(): assert pd.isna(frame.loc[path, "error"]), name
        told = [str(frame.loc[path, "note"]) for frame in tables.values()]
        assert note in told[0] and (note or told[0] == "nan") and told == told[:1]*3, name
    for name, (_, words) in BROKEN.items():
        for frame in tables.values(): assert re.search(words, frame.loc[paths[name], "error"]), name
        for frame in (predicted, evaluated): assert pd.isna(frame.loc[paths[name], "logit"]), name
        listed[:1].assign(path=paths[name]).to_csv(tmp_path/"one.csv", index=False)
        refused = imaginet("data", "pack", "set", "--list", "one.csv", "--out", f"{name}-store")
        assert refused.exit_code == 1 and name in refused.output and re.search(words, " ".join(refused.output.split())), refused.output
    for name in SMALL: # read, but not judged
        assert TOO_SMALL_NOTE in evaluated.loc[paths[name], "error"] and pd.isna(audited.loc[paths[name], "error"])
        assert predicted.loc[paths[name], "verdict"] == "unsure" and TOO_SMALL_NOTE in predicted.loc[paths[name], "reason"]

    # a data set of its own is made of them: verified, and perturbed
    broken = {paths[name]: words for name, (_, words) in BROKEN.items()} | {f"real/{name}": OTHERS[name][1] for name in NO_PICTURES}
    everything = pd.concat([listed, *(listed[:1].assign(path=path) for path in broken)], ignore_index=True)
    write_annotations(everything, tmp_path/"train_annotations.txt")
    problems = verify(tmp_path/"set", [tmp_path/"train_annotations.txt"], jobs=1)
    problems = problems[~problems["problem"].str.startswith("label: not a folder of ImagiNet")].set_index("path")["problem"]
    assert set(problems.index) == set(broken) and problems.index.is_unique
    for path, words in broken.items():
        assert problems[path].startswith("damaged: ") and re.search(words, problems[path]), path
        alone = listed[:1].assign(path=path, split="test")
        with pytest.raises(ImageError, match=f"{re.escape(path)}: .*({words})"):
            make_testset(alone, tmp_path/"set", PERTURB, seed=0, jobs=1)
    made = make_testset(listed.assign(split="test"), tmp_path/"set", PERTURB, seed=0, jobs=1)
    assert set(made["source"]) == set(listed["path"])
    for row, (source, path) in enumerate(zip(made["source"], made["path"], strict=True)):
        pixels = decode(contents[Path(source).name])
        assert np.array_equal(decode(tmp_path/"set"/path), PERTURB(pixels, rng(0, "testset", 0, row))), source
