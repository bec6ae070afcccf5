"""A server on the loopback that speaks the part of the hub's protocol that is needed to fetch a gated data set, and its mishaps."""
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from imaginet_nb.data.imaginet import HUB_DATASET, LISTS_COMMIT, LISTS_REPOSITORY

COMMIT, TOKEN = "a"*40, "hf_let_me_in"


@dataclass
class Hub:
    "What is served, and what goes wrong."
    volumes: Path # folder with the volumes
    lists: Path # folder with the lists
    address: str = ""
    cut_at: dict[str, list[int]] = field(default_factory=dict) # volume -> after how many bytes each next answer breaks off
    flipped: set[str] = field(default_factory=set) # volumes that arrive with one wrong byte
    refusal: tuple[int, str] | None = None # status and error code of every answer about the data set
    ranges: list[tuple[str, str]] = field(default_factory=list) # volume and Range header of each request

    def environment(self, token: str | None = TOKEN) -> dict[str, str]:
        "Variables that lead the commands here."
        home = str(self.volumes.parent/"hub-home")
        return {"HF_ENDPOINT": self.address, "IMAGINET_LISTS_ENDPOINT": self.address, "HF_HOME": home, "HF_TOKEN": token or "",
                "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1,localhost"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version, hub = "HTTP/1.1", None

    def log_message(self, *_: object) -> None: pass

    def answer(self, status: int, body: bytes = b"", cut: int | None = None, **headers: object) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items(): self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "HEAD": return
        self.wfile.write(body if cut is None else body[:cut])
        if cut is not None: self.close_connection = True

    def do_HEAD(self) -> None: self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith(f"/{LISTS_REPOSITORY}/{LISTS_COMMIT}/"): return self.send_list(path.rpartition("/")[2])
        if path.startswith("/cdn/"): return self.send_volume(path.rpartition("/")[2])
        if HUB_DATASET not in path: return self.answer(404)
        if self.hub.refusal: return self.answer(self.hub.refusal[0], X_Error_Code=self.hub.refusal[1], X_Error_Message="refused")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, X_Error_Code="GatedRepo", X_Error_Message="Access to this data set is restricted")
        if path.startswith("/api/datasets/"): return self.answer(200, json.dumps(self.describe()).encode(), Content_Type="application/json")
        found = re.search(r"/resolve/[^/]+/(.+)$", path)
        if found and (self.hub.volumes/found[1]).is_file(): return self.redirect(found[1])
        self.answer(404, X_Error_Code="EntryNotFound")

    def describe(self) -> dict:
        siblings = [dict(rfilename=v.name, size=v.stat().st_size, blobId="b"*40,
                         lfs=dict(sha256=hashlib.sha256(v.read_bytes()).hexdigest(), size=v.stat().st_size, pointerSize=130))
                    for v in sorted(self.hub.volumes.iterdir())]
        about = dict(private=False, gated="auto", disabled=False, downloads=0, likes=0, tags=[])
        return dict(id=HUB_DATASET, sha=COMMIT, siblings=siblings, **about)

    def send_list(self, name: str) -> None:
        file = self.hub.lists/name
        self.answer(200, file.read_bytes()) if file.is_file() else self.answer(404)

    def redirect(self, name: str) -> None:
        "Large files lie elsewhere: a signed address on another host."
        elsewhere = self.hub.address.replace("127.0.0.1", "localhost")
        self.answer(302, Location=f"{elsewhere}/cdn/{name}?signature=x", ETag=f'"{name}"', X_Repo_Commit=COMMIT,
                    X_Linked_Size=(self.hub.volumes/name).stat().st_size, X_Linked_Etag=f'"{name}"')

    def send_volume(self, name: str) -> None:
        if self.headers.get("Authorization"): return self.answer(400) # the token is no business of another host
        body = (self.hub.volumes/name).read_bytes()
        if name in self.hub.flipped: body = body[:len(body)//2] + bytes([body[len(body)//2] ^ 1]) + body[len(body)//2 + 1:]
        asked = self.headers.get("Range", "")
        if self.command == "GET": self.hub.ranges.append((name, asked))
        start = int(re.match(r"bytes=(\d+)-", asked)[1]) if asked else 0
        cut = self.hub.cut_at[name].pop(0) if self.command == "GET" and self.hub.cut_at.get(name) else None
        part = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if asked else {}
        self.answer(206 if asked else 200, body[start:], cut, ETag=f'"{name}"', X_Repo_Commit=COMMIT, Accept_Ranges="bytes", **part)


@contextmanager
def serve(volumes: Path, lists: Path) -> Iterator[Hub]:
    "Run the server while the block runs."
    hub = Hub(volumes, lists)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), dict(hub=hub)))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield hub
    finally:
        server.shutdown()
        server.server_close()
