"""An in-memory bucket with the part of the Cloud Storage JSON API that a run uses: tests gs:// without a network.

    with serve() as (store, environment):
        subprocess.run([...], env=os.environ | environment)     # gs://any-bucket/... lands in store.objects

A process reads those variables when it first imports gcsfs or TensorStore, so tests run them in a child process.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from urllib.parse import parse_qsl, unquote, urlsplit


class Store:
    """Objects by "bucket/name". One lock makes every request atomic, as the real service does."""

    def __init__(self):
        self.objects: dict[str, tuple[int, bytes]] = {}  # generation, data
        self.sessions: dict[str, tuple[str, dict[str, str], bytearray]] = {}
        self.generation = 0
        self.lock = threading.RLock()

    def put(self, key: str, data: bytes, query: dict[str, str]) -> dict | None:
        """The new object's description, or None if the generation does not match."""
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != self.objects.get(key, (0,))[0]:
            return None
        self.generation += 1
        self.objects[key] = (self.generation, bytes(data))
        return self.describe(key)

    def describe(self, key: str) -> dict:
        generation, data = self.objects[key]
        bucket, name = key.split("/", 1)
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "size": str(len(data)),
            "generation": str(generation),
            "metageneration": "1",
            "md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode(),
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "updated": "2026-01-01T00:00:00.000Z",
        }

    def list(self, bucket: str, query: dict[str, str]) -> dict:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        names = sorted(key.split("/", 1)[1] for key in self.objects if key.startswith(f"{bucket}/{prefix}"))
        names = [name for name in names if query.get("startOffset", "") <= name < query.get("endOffset", "\U0010ffff")]
        items, prefixes = [], {}
        for name in names:
            head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
            if found:
                prefixes[prefix + head + delimiter] = True
            else:
                items.append(self.describe(f"{bucket}/{name}"))
        return {"kind": "storage#objects", "items": items, "prefixes": list(prefixes)}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body in one packet
    store: Store

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        query = dict(parse_qsl(url.query))
        body = self.read_body()
        path = url.path.replace("/download/storage", "/storage")
        with self.store.lock:
            if match := re.fullmatch(r"/storage/v1/b/([^/]+)/o", path):
                self.reply(json_of=self.store.list(match[1], query))
            elif match := re.fullmatch(r"/(?:resumable/)?upload/storage/v1/b/([^/]+)/o", path):
                self.upload(match[1], query, body)
            elif match := re.fullmatch(r"/storage/v1/b/([^/]+)/o/([^/]+)/rewriteTo/b/([^/]+)/o/([^/]+)", path):
                self.copy(f"{match[1]}/{unquote(match[2])}", f"{match[3]}/{unquote(match[4])}")
            elif match := re.fullmatch(r"/storage/v1/b/([^/]+)/o/([^/]+)/moveTo/o/([^/]+)", path):
                self.copy(f"{match[1]}/{unquote(match[2])}", f"{match[1]}/{unquote(match[3])}", move=True)
            elif match := re.fullmatch(r"/storage/v1/b/([^/]+)/o/(.+)", path):
                self.object(f"{match[1]}/{unquote(match[2])}", query)
            elif match := re.fullmatch(r"/storage/v1/b/([^/]+)", path):
                self.reply(json_of={"kind": "storage#bucket", "name": match[1], "id": match[1], "metageneration": "1"})
            else:
                self.reply(404, json_of={"error": {"code": 404, "message": f"{self.command} {self.path}"}})

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = handle_any  # noqa: N815

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def upload(self, bucket: str, query: dict[str, str], body: bytes) -> None:
        kind = query.get("uploadType")
        if "upload_id" in query:
            self.resume(query["upload_id"], body)
        elif kind == "resumable":
            name = query.get("name") or json.loads(body)["name"]
            session = str(len(self.store.sessions))
            self.store.sessions[session] = (f"{bucket}/{name}", query, bytearray())
            host = self.headers["Host"]
            location = f"http://{host}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={session}"
            self.reply(json_of={}, headers={"Location": location})
        elif kind == "multipart":
            boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            described, data = (part.split(b"\r\n\r\n", 1)[1] for part in split_parts(body, boundary))
            name = query.get("name") or json.loads(described)["name"]
            self.created(self.store.put(f"{bucket}/{name}", data, query))
        else:
            self.created(self.store.put(f"{bucket}/{query['name']}", body, query))

    def resume(self, session: str, body: bytes) -> None:
        key, query, data = self.store.sessions[session]
        data += body
        if self.headers.get("Content-Range", "").endswith("/*"):
            self.reply(308, headers={"Range": f"bytes=0-{len(data) - 1}"})
        else:
            self.created(self.store.put(key, data, query))

    def created(self, described: dict | None) -> None:
        if described is None:
            self.reply(412, json_of={"error": {"code": 412, "message": "conditionNotMet"}})
        else:
            self.reply(json_of=described)

    def copy(self, source: str, target: str, move: bool = False) -> None:
        if source not in self.store.objects:
            self.missing(source)
            return
        described = self.store.put(target, self.store.objects[source][1], {})
        if move:
            del self.store.objects[source]
            self.reply(json_of=described)
        else:
            self.reply(json_of={"kind": "storage#rewriteResponse", "done": True, "resource": described})

    def missing(self, key: str) -> None:
        self.reply(404, json_of={"error": {"code": 404, "message": f"No such object: {key}"}})

    def object(self, key: str, query: dict[str, str]) -> None:
        if key not in self.store.objects:
            self.missing(key)
        elif self.command == "DELETE":
            del self.store.objects[key]
            self.reply(204)
        elif query.get("alt") != "media":
            self.reply(json_of=self.store.describe(key))
        else:
            generation, data = self.store.objects[key]
            span = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
            headers = {"x-goog-generation": str(generation)}
            if span is None:
                self.reply(200, data, headers=headers)
                return
            first = int(span[1]) if span[1] else len(data) - int(span[2])
            last = min(int(span[2]) if span[1] and span[2] else len(data) - 1, len(data) - 1)
            if first > last:
                self.reply(416, headers={"Content-Range": f"bytes */{len(data)}"})
                return
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            self.reply(206, data[first : last + 1], headers=headers)

    def reply(self, status: int = 200, body: bytes = b"", *, json_of: dict | None = None, headers=()) -> None:
        if json_of is not None:
            body = json.dumps(json_of).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if json_of is None else "application/json")
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        """Ignores clients that hang up."""


def split_parts(body: bytes, boundary: bytes) -> list[bytes]:
    """The parts of a multipart body, without the line ends that frame them."""
    pieces = body.split(b"--" + boundary)[1:-1]
    return [piece.removeprefix(b"\r\n").removesuffix(b"\r\n") for piece in pieces]


@contextlib.contextmanager
def serve() -> Iterator[tuple[Store, dict[str, str]]]:
    """A running stand-in: its store, and the environment that points gcsfs, Google's client and TensorStore to it."""
    handler = type("BoundHandler", (Handler,), {"store": Store()})
    server = Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"127.0.0.1:{server.server_port}"
    environment = {
        "STORAGE_EMULATOR_HOST": f"http://{address}",
        "TENSORSTORE_GCS_HTTP_URL": f"http://{address}",
        "GCE_METADATA_ROOT": address,  # no credentials here: TensorStore does without
        "GCE_METADATA_HOST": address,
        "NO_GCE_CHECK": "true",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "GOOGLE_CLOUD_PROJECT": "stand-in",
        "EPATH_USE_TF": "false",
        "no_proxy": "127.0.0.1",
    }
    try:
        yield handler.store, environment
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
