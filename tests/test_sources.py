"""The way of the real ImagiNet, walked on a look-alike: hub, volumes, images; and everything that can go wrong on it."""
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import py7zr
import pytest
from bad_images import BAD, ODD
from forks import imaginet
from hub import COMMIT, TOKEN, serve
from multivolumefile import MultiVolume

from imaginet_nb.core import repo_root
from imaginet_nb.data import imaginet as S
from imaginet_nb.data.images import decode, save
from imaginet_nb.data.labels import AnnotationError
from imaginet_nb.data.splits import read_annotations, write_annotations

VOLUME = 20_000


def pack(folder: Path, archive: Path, outer: str = "") -> None:
    "Pack the images of a folder, not its lists, into volumes."
    archive.mkdir(parents=True)
    with MultiVolume(str(archive/"imaginet.7z"), "wb", volume=VOLUME, ext_digits=3) as target, py7zr.SevenZipFile(target, "w") as file:
        for path in sorted(p for p in folder.rglob("*") if p.is_file() and "annotations" not in p.parts):
            file.write(path, f"{outer}{path.relative_to(folder).as_posix()}")


def pictures(folder: Path, n: int = 10) -> Path:
    "A small data set in the layout, with its list."
    labels = {"ffhq": ("real", "faces", "real", "real"), "sd_faces_fake": ("synthetic", "faces", "SD", "SD v2.1")}
    rows = []
    for i in range(n):
        for name, values in labels.items():
            path = f"{name}/{i}.{'png' if name == 'ffhq' else 'webp'}"
            save(np.random.default_rng([i, len(name)]).integers(0, 256, (48, 40, 3), dtype=np.uint8), folder/path, lossless=name != "ffhq")
            rows.append(dict(zip(("path", "origin", "content_type", "generator_family", "generator", "split"), (path, *values, "test"))))
    for name, part in zip(S.LISTS, (rows[4:], rows[4:12], rows[:4])): write_annotations(pd.DataFrame(part), folder/"annotations"/name)
    (folder/"annotations"/S.FFHQ_LIST).write_text("".join(
        f"drive{i},{i}.png,{hashlib.md5(decode(folder/'ffhq'/f'{i}.png').tobytes()).hexdigest()}\n" for i in range(n)))
    for name in (*S.LISTS[3:], *S.EXTERNAL_LISTS): shutil.copy(folder/"annotations"/S.LISTS[2], folder/"annotations"/name)
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return pictures(tmp_path_factory.mktemp("original")/"imaginet")


@pytest.fixture(scope="module")
def volumes(original, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("served")/"volumes"
    pack(original, folder)
    assert len(list(folder.iterdir())) >= 4
    return folder


@pytest.fixture
def archive(volumes, tmp_path) -> Path:
    "The volumes, as if downloaded."
    return Path(shutil.copytree(volumes, tmp_path/"archive"))


@pytest.fixture
def hub(volumes, original):
    with serve(volumes, original/"annotations") as running: yield running


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def images_of(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in content(folder).items() if name.startswith(("ffhq/", "sd_faces_fake/"))}


# --- download

def test_from_an_empty_folder_to_a_verified_data_set(hub, original, tmp_path):
    """The three commands; a connection that breaks in the middle of a volume is taken up where it broke."""
    out, environment = tmp_path/"imaginet", hub.environment()
    hub.cut_at["imaginet.7z.002"] = [7_000]
    result = imaginet("data", "download", "--out", out, **environment)
    assert result.returncode == 0, result.stderr
    assert [name for name, _ in hub.ranges].count("imaginet.7z.002") == 2 and len(hub.ranges) == len(list(hub.volumes.iterdir())) + 1
    assert {k: v for k, v in content(out/"archive").items() if k != "volumes.json"} == content(hub.volumes)
    asked = len(hub.ranges)
    assert imaginet("data", "download", "--out", out, **environment).returncode == 0 and len(hub.ranges) == asked # nothing is fetched twice
    result = imaginet("data", "unpack", out/"archive", "--out", out)
    assert result.returncode == 0 and "20 files unpacked" in result.stdout, result.stderr
    assert images_of(out) == images_of(original)
    result = imaginet("data", "verify", out, "--jobs", 1)
    assert result.returncode == 0 and "there and right" in result.stdout, result.stdout + result.stderr


def test_a_broken_download_goes_on_in_the_next_call(hub, tmp_path, monkeypatch):
    """All retries of one call break: no file under its final name; the next call asks for the rest alone."""
    for name, value in hub.environment().items(): monkeypatch.setenv(name, value)
    monkeypatch.setattr("time.sleep", lambda _: None)
    set_endpoint(monkeypatch, hub)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1_000) # its 10 MB are more than these volumes
    hub.cut_at["imaginet.7z.001"] = [5_000] + [0]*40
    with pytest.raises(S.SourceError, match="continues where it stopped"): S.download_images(tmp_path)
    assert not (tmp_path/"archive"/"imaginet.7z.001").exists()
    assert (tmp_path/"archive"/"imaginet.7z.001.part").stat().st_size == 5_000
    with pytest.raises(S.SourceError, match="not complete"): S.find_volumes(tmp_path/"archive")
    hub.cut_at.clear()
    hub.ranges.clear()
    S.download_images(tmp_path)
    assert hub.ranges[0] == ("imaginet.7z.001", "bytes=5000-")
    assert (tmp_path/"archive"/"imaginet.7z.001").read_bytes() == (hub.volumes/"imaginet.7z.001").read_bytes()


def set_endpoint(monkeypatch, hub) -> None:
    "The client reads its variables when it is imported; in this process it is told directly."
    import huggingface_hub.constants as constants
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(S, "HfApi", lambda: __import__("huggingface_hub").HfApi(endpoint=hub.address, token=TOKEN))
    monkeypatch.setattr(S, "build_hf_headers", lambda: {"authorization": f"Bearer {TOKEN}"})


@pytest.mark.parametrize("refusal, token, words", [
    (None, None, "accept the terms"),
    (None, "hf_wrong", "accept the terms"),
    ((403, "GatedRepo"), TOKEN, "access is not granted yet"),
    ((401, ""), TOKEN, "HF_TOKEN"),
    ((404, "RepoNotFound"), TOKEN, "valid token"),
    ((404, "RevisionNotFound"), TOKEN, "--revision"),
    ((503, ""), TOKEN, "503"),
], ids=["no token", "wrong token", "gated", "401", "404", "revision", "503"])
def test_a_refusal_says_what_to_do(hub, tmp_path, refusal, token, words):
    hub.refusal = refusal
    result = imaginet("data", "download", "--out", tmp_path, "--what", "images", **hub.environment(token))
    assert result.returncode == 1 and words in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert not list(tmp_path.rglob("*.7z.*"))


def test_a_flipped_byte_on_the_way_is_noticed(hub, tmp_path, monkeypatch):
    set_endpoint(monkeypatch, hub)
    hub.flipped = {"imaginet.7z.002"}
    with pytest.raises(S.SourceError, match="imaginet.7z.002: .*SHA-256"): S.download_images(tmp_path)
    assert [p.name for p in sorted((tmp_path/"archive").iterdir())] == ["imaginet.7z.001", "volumes.json"]
    hub.flipped = set()
    S.download_images(tmp_path)
    assert (tmp_path/"archive"/"imaginet.7z.002").read_bytes() == (hub.volumes/"imaginet.7z.002").read_bytes()


def test_too_little_disk_is_said_before_the_start(hub, tmp_path, monkeypatch):
    set_endpoint(monkeypatch, hub)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 10))
    with pytest.raises(S.SourceError, match="GB are free"): S.download_images(tmp_path)
    assert not hub.ranges


def test_a_list_that_is_not_there(hub, tmp_path):
    result = imaginet("data", "download", "--out", tmp_path, "--what", "annotations",
                      **{**hub.environment(), "IMAGINET_LISTS_ENDPOINT": hub.address + "/nowhere"})
    assert result.returncode == 1 and "404" in result.stderr and not list(tmp_path.rglob("*.txt"))
    assert COMMIT not in result.stderr


# --- unpack

@pytest.mark.parametrize("outer", ["", "imaginet/"])
def test_unpack_finds_the_layout_with_and_without_an_outer_folder(original, tmp_path, outer):
    pack(original, tmp_path/"archive", outer)
    assert S.unpack(tmp_path/"archive", tmp_path/"out") == 20
    assert images_of(tmp_path/"out") == images_of(original)


def test_unpack_again_writes_only_what_is_missing_or_wrong(archive, original, tmp_path):
    out = tmp_path/"out"
    S.unpack(archive, out)
    (out/"ffhq"/"1.png").unlink()
    (out/"ffhq"/"2.png").write_bytes(b"shorter")
    data = bytearray((out/"ffhq"/"3.png").read_bytes()); data[100] ^= 1
    (out/"ffhq"/"3.png").write_bytes(data)
    untouched = (out/"ffhq"/"4.png").stat().st_mtime_ns
    assert S.unpack(archive, out) == 3
    assert images_of(out) == images_of(original) and (out/"ffhq"/"4.png").stat().st_mtime_ns == untouched


def test_a_killed_unpack_goes_on(archive, original, tmp_path):
    """The process dies while the sixth file is being written: five are there, and no partial one under a final name."""
    script = ("import os, sys; from imaginet_nb.data import imaginet as S\n"
              "def write(self, s, n=[0], real=S._Target.write):\n    n[0] += 1\n    if n[0] > 5: os._exit(9)\n    return real(self, s)\n"
              "S._Target.write = write; S.unpack(sys.argv[1], sys.argv[2])")
    assert subprocess.run([sys.executable, "-c", script, archive, tmp_path/"out"]).returncode == 9
    before = {name: data for name, data in content(tmp_path/"out").items() if not name.endswith(".part")}
    assert 0 < len(before) < 20 and before.items() <= images_of(original).items()
    assert S.unpack(archive, tmp_path/"out") == 20 - len(before)
    assert content(tmp_path/"out") == images_of(original)


def test_a_missing_volume_is_named(archive):
    (archive/"imaginet.7z.002").unlink()
    with pytest.raises(S.SourceError, match="imaginet.7z.002 is missing"): S.unpack(archive, archive.parent/"out")


def test_a_missing_last_volume_is_known_from_the_first(archive):
    sorted(archive.iterdir())[-1].unlink()
    with pytest.raises(S.SourceError, match="bytes too early"): S.unpack(archive, archive.parent/"out")


def test_a_truncated_volume_is_named(archive):
    os.truncate(archive/"imaginet.7z.002", VOLUME - 1)
    with pytest.raises(S.SourceError, match="imaginet.7z.002 has 19,999 bytes instead of 20,000"): S.unpack(archive, archive.parent/"out")


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_damaged_volume_is_named(archive, tmp_path, number):
    """A flipped byte: the volume is named by its hash, or else the volumes it must be among; nothing partial is left."""
    facts = {p.name: [p.stat().st_size, hashlib.sha256(p.read_bytes()).hexdigest()] for p in archive.iterdir()}
    path = archive/f"imaginet.7z.{number:03d}"
    data = bytearray(path.read_bytes()); data[VOLUME//2] ^= 255
    path.write_bytes(data)
    with pytest.raises(S.SourceError, match="one of imaginet.7z.001 to .* is damaged"): S.unpack(archive, tmp_path/"out")
    (archive/"volumes.json").write_text(json.dumps(facts))
    with pytest.raises(S.SourceError, match=f"; imaginet.7z.{number:03d} is damaged: delete it"): S.unpack(archive, tmp_path/"out")
    assert not list((tmp_path/"out").rglob("*.part"))


def test_a_damaged_end_is_said(archive, tmp_path):
    last = sorted(archive.iterdir())[-1]
    data = bytearray(last.read_bytes()); data[-20] ^= 255
    last.write_bytes(data)
    with pytest.raises(S.SourceError, match=last.name): S.unpack(archive, tmp_path/"out")
    assert not list(tmp_path.rglob("*.png"))


def test_not_an_archive(tmp_path):
    with pytest.raises(S.SourceError, match="imaginet data download"): S.unpack(tmp_path, tmp_path/"out")
    (tmp_path/"imaginet.7z.001").write_bytes(b"no archive at all, but long enough to have a head")
    with pytest.raises(S.SourceError, match="not the first volume"): S.unpack(tmp_path, tmp_path/"out")


def hostile(archive: Path, name: str) -> None:
    "An archive whose list of files holds a bad name: py7zr refuses to write one, so a name of the same length is changed afterwards."
    archive.mkdir()
    innocent = "x"*len(name)
    one = archive/"imaginet.7z.001"
    with py7zr.SevenZipFile(one, "w") as file:
        file.set_encoded_header_mode(False)
        file.writestr(b"data", innocent)
    data = one.read_bytes().replace(innocent.encode("utf-16-le"), name.encode("utf-16-le"))
    offset, size = struct.unpack("<QQ", data[12:28])
    start = data[12:28] + struct.pack("<I", zlib.crc32(data[32 + offset:32 + offset + size]))
    one.write_bytes(data[:8] + struct.pack("<I", zlib.crc32(start)) + start + data[32:])


@pytest.mark.parametrize("name", ["/tmp/outside.png", "../outside.png", "ffhq/../../outside.png", "C:/outside.png", "..\\outside.png"])
def test_names_that_lead_out_are_refused(tmp_path, name):
    hostile(tmp_path/"archive", name)
    with pytest.raises(S.SourceError, match="nothing was unpacked"): S.unpack(tmp_path/"archive", tmp_path/"a"/"b"/"out")
    assert not list(tmp_path.rglob("*outside*")) and not Path("/tmp/outside.png").exists()


def test_links_are_refused(tmp_path):
    (tmp_path/"folder").mkdir()
    (tmp_path/"folder"/"link.png").symlink_to("/etc/hostname")
    (tmp_path/"archive").mkdir()
    with py7zr.SevenZipFile(tmp_path/"archive"/"imaginet.7z.001", "w") as file: file.write(tmp_path/"folder"/"link.png", "ffhq/link.png")
    with pytest.raises(S.SourceError, match="a link or device"): S.unpack(tmp_path/"archive", tmp_path/"out")
    assert not list(tmp_path.rglob("out/*"))


# --- verify and build

@pytest.fixture
def there(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path/"imaginet"))


@pytest.mark.parametrize("make", BAD.values(), ids=BAD)
def test_bad_images_are_found(there, make):
    make(there/"ffhq"/"3.png")
    found = S.verify(there, jobs=1)
    assert found["path"].tolist() == ["ffhq/3.png"] and found["problem"][0].startswith("damaged: ")
    assert str(there) not in found["problem"][0]


@pytest.mark.parametrize("make", ODD.values(), ids=ODD)
def test_odd_images_are_right(there, make):
    make(there/"sd_faces_fake"/"3.webp") # what a file holds is told by its content
    assert S.verify(there, jobs=1).empty


def test_verify_from_the_command_line(there, tmp_path):
    (there/"ffhq"/"3.png").unlink()
    result = imaginet("data", "verify", there, "--out", tmp_path/"problems.csv", "--jobs", 1)
    assert result.returncode == 1 and "1 missing" in result.stderr
    assert pd.read_csv(tmp_path/"problems.csv")["path"].tolist() == ["ffhq/3.png"]


def test_verify_reads_again_only_what_changed(there, monkeypatch):
    S.verify(there, jobs=1)
    looked = []
    check = S._check_image
    monkeypatch.setattr(S, "_check_image", lambda path, md5: looked.append(path.name) or check(path, md5))
    assert S.verify(there, jobs=1).empty and looked == []
    (there/"ffhq"/"5.png").write_bytes(b"changed")
    with open(there/S._STATE, "a") as file: file.write("ffhq/5.png\t7") # a line that a kill cut short
    assert S.verify(there, jobs=1)["path"].tolist() == ["ffhq/5.png"] and looked == ["5.png"]


def test_parallel_verification_finds_the_same(there):
    for n in (2, 7): (there/"ffhq"/f"{n}.png").write_bytes(b"bad")
    one = S.verify(there, jobs=1)
    (there/S._STATE).unlink()
    S_chunks = S.verify(there, jobs=2)
    pd.testing.assert_frame_equal(one, S_chunks)


@pytest.mark.parametrize("line, words", [
    ("./ffhq/0.png,0,9,4,8", "line 5: unknown ContentType code"),
    ("./../0.png,0,2,4,8", "line 5: path leaves the image folder"),
    ("./ffhq/x.png,1,2,4,8", "line 5: .*name its generator"),
], ids=["label", "..", "contradiction"])
def test_a_bad_list_is_an_error_with_its_line(there, line, words):
    with open(there/"annotations"/"test_annotations.txt", "a") as file: file.write(line + "\n")
    with pytest.raises(AnnotationError, match=words): S.verify(there)


def test_labels_that_do_not_fit_their_folder(there):
    path = there/"annotations"/"test_annotations.txt"
    path.write_text(path.read_text().replace("./ffhq/0.png,0,2,4,8", "./ffhq/0.png,1,2,1,3"))
    for name in S.LISTS[:2]: (there/"annotations"/name).unlink()
    found = S.verify(there, jobs=1)
    assert found["path"].tolist() == ["ffhq/0.png"] and "holds real faces" in found["problem"][0]


def test_published_counts_are_compared(tmp_path):
    """40,000 lines with the published counts pass; one image moved to another folder is reported for both."""
    counts = pd.read_csv(S.shipped("data/test_split_counts.csv"), keep_default_na=False).query("level == 'source_folder'")
    rows = [dict(path=f"{r.source_folder}/{r.Index}-{i}.png", content_type=r.content_type, origin=r.origin)
            for r in counts.itertuples() for i in range(int(r.test_images))]
    test = pd.DataFrame(rows)
    assert len(test) == 40_000 and S._count_faults(test, S.shipped("data/test_split_counts.csv")) == []
    test.loc[0, "path"] = "val2017/moved.png"
    assert len(S._count_faults(test, S.shipped("data/test_split_counts.csv"))) == 2


def test_build_links_by_path_then_by_name(original, tmp_path):
    out, elsewhere = tmp_path/"out", tmp_path/"elsewhere"/"deep"
    shutil.copytree(original/"annotations", out/"annotations", ignore=shutil.ignore_patterns(S.FFHQ_LIST))
    elsewhere.mkdir(parents=True)
    for path in (original/"ffhq").iterdir(): shutil.copy(path, elsewhere)
    (tmp_path/"elsewhere"/"twice").mkdir()
    shutil.copy(original/"ffhq"/"0.png", tmp_path/"elsewhere"/"twice") # a name that occurs twice is not guessed at
    faces, fakes = tmp_path/"elsewhere", original/"sd_faces_fake"
    result = imaginet("data", "build", "--out", out, "--source", f"ffhq={faces}", "--source", f"sd_faces_fake={fakes}")
    assert result.returncode == 0 and "ffhq: 1 missing; FFHQ" in result.stdout, result.stdout + result.stderr
    assert (out/"ffhq"/"1.png").is_symlink() and (out/"ffhq"/"1.png").read_bytes() == (original/"ffhq"/"1.png").read_bytes()
    assert S.verify(out, jobs=1)["problem"].tolist() == ["missing"]
    assert imaginet("data", "build", "--out", out, "--source", "ffhq").returncode == 1


def test_every_folder_of_the_authors_lists_is_known():
    folder = Path(os.environ.get("IMAGINET_ANNOTATIONS") or repo_root().parent/"shared"/"annotations")
    if not (folder/"test_annotations.txt").is_file(): pytest.skip("the authors' annotation lists are not there; set IMAGINET_ANNOTATIONS")
    test = read_annotations(folder/"test_annotations.txt", "test")
    assert not any(S._label_fault(row) for row in test.itertuples())
    assert S._count_faults(test, S.shipped("data/test_split_counts.csv")) == []


# --- what was found in review

def test_a_folder_between_files_does_not_shift_their_names(tmp_path):
    """Two solid blocks with a folder entry inside the first: py7zr's own numbering wrote one image under another's name."""
    for n in range(4): save(np.full((8, 8, 3), n, np.uint8), tmp_path/"ffhq"/f"{n}.png")
    (tmp_path/"archive").mkdir()
    one = tmp_path/"archive"/"imaginet.7z.001"
    with py7zr.SevenZipFile(one, "w") as file:
        file.write(tmp_path/"ffhq"/"0.png", "ffhq/0.png")
        file.write(tmp_path/"ffhq", "ffhq/empty")
        for n in (1, 2): file.write(tmp_path/"ffhq"/f"{n}.png", f"ffhq/{n}.png")
    with py7zr.SevenZipFile(one, "a") as file: file.write(tmp_path/"ffhq"/"3.png", "ffhq/3.png")
    assert S.unpack(tmp_path/"archive", tmp_path/"out") == 4
    assert content(tmp_path/"out"/"ffhq") == content(tmp_path/"ffhq")
    assert S.unpack(tmp_path/"archive", tmp_path/"out") == 0


def test_content_under_a_wrong_name_is_refused(archive, tmp_path, monkeypatch):
    """A target takes only what has the checksum of its own name."""
    monkeypatch.setattr(S, "_Target", lambda path, crc32, count, real=S._Target: real(path, crc32 ^ 1, count))
    with pytest.raises(S.SourceError, match="cannot be unpacked"): S.unpack(archive, tmp_path/"out")
    assert not [p for p in (tmp_path/"out").rglob("*") if p.is_file()]


def test_a_file_named_like_a_volume_is_not_read_as_one(archive, tmp_path):
    (archive/"imaginet.7z.002.bak").write_bytes(b"x")
    with pytest.raises(S.SourceError, match="imaginet.7z.002.bak is named like a volume but is not one"): S.unpack(archive, tmp_path/"out")


def test_a_damaged_start_is_said(archive, tmp_path):
    data = bytearray((archive/"imaginet.7z.001").read_bytes()); data[14] ^= 255
    (archive/"imaginet.7z.001").write_bytes(data)
    with pytest.raises(S.SourceError, match="imaginet.7z.001: damaged in its first 32 bytes"): S.unpack(archive, tmp_path/"out")


def test_an_encrypted_archive_is_said(tmp_path):
    (tmp_path/"archive").mkdir()
    with py7zr.SevenZipFile(tmp_path/"archive"/"imaginet.7z.001", "w", password="x") as file: file.writestr(b"data", "ffhq/0.png")
    with pytest.raises(S.SourceError, match="encrypted"): S.unpack(tmp_path/"archive", tmp_path/"out")


def test_a_list_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    class Answer(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: pass
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"./ffhq/0.png,0,2,4,8")
    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("IMAGINET_LISTS_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(S.SourceError, match="run the command again"): S.download_lists(tmp_path, ["test_all.txt"])
        server.shutdown()
    assert not list(tmp_path.rglob("*.txt"))


def test_one_absent_list_does_not_block_the_others(hub, original, tmp_path, monkeypatch):
    for name, value in hub.environment().items(): monkeypatch.setenv(name, value)
    (original/"annotations"/"lasted_anchor.txt").rename(original/"gone.txt")
    try:
        with pytest.raises(S.SourceError, match="404 for lasted_anchor.txt; the other lists are there"): S.download_lists(tmp_path)
    finally: (original/"gone.txt").rename(original/"annotations"/"lasted_anchor.txt")
    assert {p.name for p in (tmp_path/"annotations").iterdir()} == {*S.LISTS, S.FFHQ_LIST, *S.EXTERNAL_LISTS} - {"lasted_anchor.txt"}


def test_a_new_revision_replaces_its_volumes_only(hub, tmp_path, monkeypatch):
    set_endpoint(monkeypatch, hub)
    S.download_images(tmp_path)
    facts = json.loads((tmp_path/"archive"/"volumes.json").read_text())
    facts["imaginet.7z.002"][1] = "0"*64 # as if an earlier revision had had another second volume
    (tmp_path/"archive"/"volumes.json").write_text(json.dumps(facts))
    hub.ranges.clear()
    S.download_images(tmp_path)
    assert [name for name, _ in hub.ranges] == ["imaginet.7z.002"]


def test_ffhq_is_recognised_by_its_pixels(original, tmp_path):
    """The authors renamed FFHQ: the original names say nothing, and a foreign image in the folder is not taken."""
    out, faces = tmp_path/"out", tmp_path/"ffhq"
    shutil.copytree(original/"annotations", out/"annotations")
    faces.mkdir()
    for i in range(9): shutil.copy(original/"ffhq"/f"{i}.png", faces/f"{69_999 - i:05d}.png")
    save(np.zeros((9, 9, 3), np.uint8), faces/"99999.png")
    report = S.build({"ffhq": faces}, out, jobs=1).set_index("folder")
    assert report.loc["ffhq", ["there", "missing"]].tolist() == [9, 1]
    assert all((out/"ffhq"/f"{i}.png").resolve().name == f"{69_999 - i:05d}.png" for i in range(9))


def test_a_wrong_face_is_found_also_if_the_list_comes_later(there):
    hashes = (there/"annotations"/S.FFHQ_LIST).read_text()
    (there/"annotations"/S.FFHQ_LIST).unlink()
    save(np.zeros((48, 40, 3), np.uint8), there/"ffhq"/"3.png")
    assert S.verify(there, jobs=1).empty
    (there/"annotations"/S.FFHQ_LIST).write_text(hashes)
    found = S.verify(there, jobs=1)
    assert found["path"].tolist() == ["ffhq/3.png"] and found["problem"][0].startswith("pixels: MD5")


def test_lists_that_contradict_each_other(there):
    lists = {"train_annotations.txt": "./ffhq/0.png,0,2,4,8\n./ffhq/1.png,0,2,4,8\n", "calibration.txt": "./ffhq/0.png,0,0,4,8\n",
             "test_annotations.txt": "./ffhq/1.png,0,2,4,8\n"}
    for name, lines in lists.items(): (there/"annotations"/name).write_text(lines)
    found = S.verify(there, jobs=1)
    assert found[["path", "split"]].to_numpy().tolist() == [["ffhq/0.png", "calibration"], ["ffhq/1.png", "test"]]
    assert found["problem"].str.split(":").str[0].tolist() == ["label", "split"]


# --- archives whose list of files is odd

def sealed(data: bytes) -> bytes:
    "The archive with the checksums that belong to its list and to its start."
    offset, size = struct.unpack("<QQ", data[12:28])
    start = data[12:28] + struct.pack("<I", zlib.crc32(data[32 + offset:32 + offset + size]))
    return data[:8] + struct.pack("<I", zlib.crc32(start)) + start + data[32:]


def listed(archive: Path, names: list[str]) -> None:
    "An archive with these names in its list, whatever they are; each holds other bytes."
    archive.mkdir()
    one, innocent = archive/"imaginet.7z.001", [chr(0x4E00 + i)*len(name) for i, name in enumerate(names)]
    with py7zr.SevenZipFile(one, "w") as file:
        file.set_encoded_header_mode(False)
        for i, name in enumerate(innocent): file.writestr(f"image {i}".encode(), name)
    data = one.read_bytes()
    for old, new in zip(innocent, names, strict=True): data = data.replace(old.encode("utf-16-le"), new.encode("utf-16-le"))
    one.write_bytes(sealed(data))


@pytest.mark.parametrize("names, words", [
    (["ffhq/0.png", "."], r"'\.', which is not a plain file name"),
    (["ffhq/0.png", "./a.png"], "'./a.png', which is not a plain file name"),
    (["ffhq/0.png", "a//b.png"], "'a//b.png', which is not a plain file name"),
    (["ffhq/0.png", "a/./b.png"], "'a/./b.png', which is not a plain file name"),
    (["ffhq/0.png", "a/"], "'a/', which is not a plain file name"),
    (["ffhq/0.png", "ffhq/1.png", "ffhq/0.png"], "'ffhq/0.png' twice"),
    ([".a.png.part", "a.png"], r"'a.png' and '.a.png.part', which cannot exist side by side"),
    (["ffhq/.a.png.part", "ffhq/a.png"], r"'ffhq/a.png' and 'ffhq/.a.png.part', which cannot"),
    (["ffhq/0.png", "ffhq"], "'ffhq/0.png' and 'ffhq', which cannot"),
    (["ffhq/0.png", "ffhq/0.png/1.png"], "which cannot exist side by side"),
    (["x"*250 + ".png"], "whose name is too long for a file here"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_names_that_are_not_plain_or_not_their_own_are_refused(tmp_path, names, words):
    """Nothing is written, and no volume is called damaged."""
    listed(tmp_path/"archive", names)
    with pytest.raises(S.SourceError, match=words) as error: S.unpack(tmp_path/"archive", tmp_path/"out")
    assert "nothing was unpacked" in str(error.value) and "damaged" not in str(error.value)
    assert not (tmp_path/"out").exists()


def test_an_empty_name_is_refused(tmp_path):
    """py7zr 1.1.4 calls such a list damaged; should another release accept it, the check of names refuses it."""
    listed(tmp_path/"archive", ["ffhq/0.png", "\0"])
    with pytest.raises(S.SourceError): S.unpack(tmp_path/"archive", tmp_path/"out")
    assert not (tmp_path/"out").exists()
    entry = SimpleNamespace(filename="", is_symlink=False, is_file=True, is_directory=False)
    with pytest.raises(S.SourceError, match="'', which is not a plain file name; nothing was unpacked"): S._safe_names([entry])


@pytest.mark.parametrize("there, words", [("ffhq/0.png/x", "a folder where the archive has a file"),
                                          ("ffhq", "a file where the archive has a folder")])
def test_what_stands_in_the_way_of_an_archive_is_named(tmp_path, there, words):
    listed(tmp_path/"archive", ["ffhq/0.png"])
    (tmp_path/"out"/there).parent.mkdir(parents=True)
    (tmp_path/"out"/there).write_text("mine")
    with pytest.raises(S.SourceError, match=words): S.unpack(tmp_path/"archive", tmp_path/"out")
    assert (tmp_path/"out"/there).read_text() == "mine"


def test_odd_names_that_are_plain_are_unpacked_and_counted(tmp_path):
    names = ["...", ".hidden", "a .png", "ffhq/.0.png.part", "ffhq/1.png.part", "ffhq/ü\n.png", "-rf"]
    listed(tmp_path/"archive", names)
    assert S.unpack(tmp_path/"archive", tmp_path/"out") == len(names)
    assert content(tmp_path/"out") == {name: f"image {i}".encode() for i, name in enumerate(names)}
    assert S.unpack(tmp_path/"archive", tmp_path/"out") == 0


def test_fuzzed_archives_give_files_or_a_source_error(tmp_path):
    """300 archives with a few bytes changed in list, start or data, half of them with the checksums put right."""
    listed(tmp_path/"good", ["ffhq/0.png", "ffhq/1.png", "sd_faces_fake/0.webp", ".b.png"])
    good = (tmp_path/"good"/"imaginet.7z.001").read_bytes()
    draw, unpacked = np.random.default_rng(0), 0
    begin = 32 + struct.unpack("<Q", good[12:20])[0] # of the list
    for n in range(300):
        data = bytearray(good)
        for _ in range(draw.integers(1, 4)):
            place = int(draw.integers(12, 32) if n % 10 == 0 else draw.integers(begin, len(data)) if n % 3 else draw.integers(len(data)))
            data[place] = draw.integers(256) if draw.random() < 0.5 else data[place] ^ (1 << int(draw.integers(8)))
        folder = tmp_path/f"round-{n}"
        (folder/"archive").mkdir(parents=True)
        inside = struct.unpack("<QQ", data[12:28])
        (folder/"archive"/"imaginet.7z.001").write_bytes(sealed(bytes(data)) if n % 2 and sum(inside) <= len(data) else bytes(data))
        try: count = S.unpack(folder/"archive", folder/"a"/"out")
        except S.SourceError: pass
        else:
            unpacked += count > 0
            assert count == len(content(folder/"a"))
        assert not list(folder.rglob("*.part"))
        assert {p.relative_to(folder).parts[:2] for p in folder.rglob("*") if p.is_file()} <= {("archive", "imaginet.7z.001"), ("a", "out")}
    assert unpacked > 5
