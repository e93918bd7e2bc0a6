"""A server that speaks as much of Cloud Storage's JSON API as gcsfs needs: one bucket after another, held in memory."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
import time
import urllib.parse


class Server(http.server.ThreadingHTTPServer):
    """Attributes: objects, {"bucket/name": bytes}; seconds, what each request takes."""

    daemon_threads = True
    request_queue_size = 1024  # a client asks for hundreds at once; those beyond it would hang for minutes

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects, self.uploads, self.guard, self.seconds = {}, {}, threading.Lock(), 0.0
        self.environment = {
            "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{self.server_port}", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
        }  # fmt: skip

    def handle_error(self, *_):
        """A client that is killed, or has heard enough, is none."""


@contextlib.contextmanager
def running():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, value=None, data=None, **headers):
        body = data if data is not None else b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(body)

    def missing(self):
        self.answer(404, {"error": {"code": 404, "message": "No such object"}})

    def metadata(self, key):
        bucket, name = key.split("/", 1)
        data = self.server.objects[key]
        digest = base64.b64encode(hashlib.md5(data).digest()).decode()
        moment = "2026-01-01T00:00:00.000Z"
        return {
            "kind": "storage#object", "bucket": bucket, "name": name, "size": str(len(data)), "md5Hash": digest,
            "timeCreated": moment, "updated": moment, "generation": "1",
        }  # fmt: skip

    def read(self):
        time.sleep(self.server.seconds)
        url = urllib.parse.urlsplit(self.path)
        self.query = {name: values[0] for name, values in urllib.parse.parse_qs(url.query).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        match = re.fullmatch(r"(?:/upload|/download)?/storage/v1/b/([^/]+)(?:/o(?:/(.*))?)?", url.path)
        bucket, name = map(urllib.parse.unquote, (match[1], match[2] or ""))
        return body, bucket, f"{bucket}/{name}"

    def do_GET(self):
        _, bucket, key = self.read()
        with self.server.guard:
            if key.endswith("/"):
                return self.answer(200, self.listing(bucket))
            if key not in self.server.objects:
                return self.missing()
            if self.query.get("alt") != "media":
                return self.answer(200, self.metadata(key))
            data, wanted = self.server.objects[key], re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted:
            first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
            if first >= len(data):
                return self.answer(416, {"error": {"code": 416, "message": "Requested range not satisfiable"}})
            span = f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"
            return self.answer(206, data=data[first : last + 1], Content_Range=span)
        self.answer(200, data=data)

    def listing(self, bucket):
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter")
        items, prefixes = [], set()
        for key in sorted(self.server.objects):
            name = key.removeprefix(f"{bucket}/")
            if key.startswith(f"{bucket}/{prefix}"):
                rest = name[len(prefix) :]
                if delimiter and delimiter in rest:
                    prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
                else:
                    items.append(self.metadata(key))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}

    def store(self, key, data):
        """An object appears at once and whole."""
        with self.server.guard:
            if self.query.get("ifGenerationMatch") == "0" and key in self.server.objects:
                return self.answer(412, {"error": {"code": 412, "message": "Precondition Failed"}})
            self.server.objects[key] = data
            self.answer(200, self.metadata(key))

    def do_POST(self):
        body, bucket, _ = self.read()
        if "Content-Range" in self.headers:
            return self.append(body, bucket)
        if self.query["uploadType"] == "multipart":
            mark = re.search(r'boundary="?([^"]+)"?', self.headers["Content-Type"])[1].encode()
            _, head, rest = body.split(b"--" + mark, 2)
            data = rest.split(b"\n\n", 1)[1].removesuffix(b"\n--" + mark + b"--")
            name = json.loads(head.split(b"\n\n", 1)[1])["name"]
            return self.store(f"{bucket}/{name}", data)
        number = str(len(self.server.uploads))
        self.server.uploads[number] = bytearray()
        query = urllib.parse.urlencode({"name": json.loads(body)["name"], "number": number} | self.query)
        self.answer(200, Location=f"{self.server.environment['STORAGE_EMULATOR_HOST']}/upload/storage/v1/b/{bucket}/o?{query}")

    def append(self, body, bucket):
        """A part of a resumable upload; the object is there after the last one."""
        data = self.server.uploads[self.query["number"]]
        data += body
        total = int(self.headers["Content-Range"].split("/")[1])
        if len(data) < total:
            return self.answer(308, Range=f"bytes=0-{len(data) - 1}")
        self.store(f"{bucket}/{self.query['name']}", bytes(data))

    def do_DELETE(self):
        _, _, key = self.read()
        with self.server.guard:
            if self.server.objects.pop(key, None) is None:
                return self.missing()
        self.answer(204)
