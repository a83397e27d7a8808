"""A small in-memory S3 server for tests, with faults on demand and what object_store needs.

``s3_server()`` runs it in a process of its own, as deltalake holds the GIL during some requests: a
thread of the test could not answer them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit
from xml.sax.saxutils import escape, unescape

BUCKET = "bucket"
KEY, SECRET = "AKIATESTKEY", "test/secret+key"


@dataclass(frozen=True)
class Faults:
    """The faults of a server. ``S3Server.set_faults`` takes the same names.

    Attributes:
        latency_seconds: delay before each answer.
        failing: share of the requests that fail with ``status`` before they have any effect, among
            those that contain ``failing_in`` (as :meth:`S3Server.requests` lists them).
        status: the status of those answers (500, 503 ...).
        lost_replies: number of next objects that are stored, but whose reply is lost.
        lost_share: share of the other objects whose reply is lost as well.
        lost_keys: pattern of the keys of those objects; by default, of commits.
        lost_status: the answer instead of a lost reply; 0 closes the connection.
        hanging: requests that contain this get no answer while it is set; "": none.
        conditional_puts: if False, ignore If-None-Match, as old S3-compatible servers do.
        page: entries per page of a listing.
    """

    latency_seconds: float = 0.0
    failing: float = 0.0
    failing_in: str = ""
    status: int = 503
    lost_replies: int = 0
    lost_share: float = 0.0
    lost_keys: str = r"_delta_log/\d+\.json$"
    lost_status: int = 500
    hanging: str = ""
    conditional_puts: bool = True
    page: int = 1000


class S3Server:
    """The test's side of a running server.

    Attributes:
        url: the URL of its bucket.
        endpoint: the server's address.
        storage_options: deltalake's options to reach it, with few and short retries.
    """

    def __init__(self, port: int) -> None:
        self.url = f"s3://{BUCKET}"
        self.endpoint = f"http://127.0.0.1:{port}"
        self.storage_options = {
            "aws_endpoint_url": self.endpoint,
            "aws_region": "eu-west-1",
            "aws_access_key_id": KEY,
            "aws_secret_access_key": SECRET,
            "allow_http": "true",
            "max_retries": "10",
            "retry_timeout": "10s",
            "backoff_config.init_backoff": "5ms",
            "backoff_config.max_backoff": "20ms",
        }

    def set_faults(self, **faults: Any) -> None:
        """Replace all faults by these."""
        self._ask("faults", faults)

    def requests(self) -> list[str]:
        """Return the requests since the last call, as "PUT key" or "GET ?query", in order."""
        requests: list[str] = self._ask("requests")
        return requests

    def stored(self, part: str = "") -> list[str]:
        """Return the keys of objects that contain ``part``."""
        return [key for key in self._ask("keys") if part in key]

    def _ask(self, command: str, data: Any = None) -> Any:
        body = json.dumps(data).encode()
        with urllib.request.urlopen(f"{self.endpoint}/_control/{command}", body) as reply:
            return json.load(reply)


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    """Run a server with an empty bucket, in a process of its own."""
    with subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield S3Server(int(process.stdout.readline()))
        finally:
            process.kill()


# ---- In the server's process ----


class Bucket:
    """Objects by key, and the parts of uploads that are not complete."""

    def __init__(self) -> None:
        self.faults = Faults()
        self.lock = threading.Lock()
        self.objects: dict[str, bytes] = {}
        self.modified: dict[str, float] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.requests: list[str] = []
        self.chance = random.Random(0)  # the same requests in one order fail each time

    def control(self, command: str, data: Any) -> Any:
        if command == "keys":
            return sorted(self.objects)
        if command == "faults":
            self.faults = Faults(**data)
            return None
        requests, self.requests = self.requests, []
        return requests

    def put(self, key: str, body: bytes, *, only_new: bool) -> bool:
        if only_new and self.faults.conditional_puts and key in self.objects:
            return False
        self.objects[key], self.modified[key] = body, time.time()
        return True

    def loses_reply(self, key: str) -> bool:
        if not re.search(self.faults.lost_keys, key):
            return False
        if self.faults.lost_replies:
            self.faults = replace(self.faults, lost_replies=self.faults.lost_replies - 1)
            return True
        return self.chance.random() < self.faults.lost_share

    def listing(self, query: dict[str, str]) -> str:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        entries = {}
        for key in self.objects:
            if key.startswith(prefix) and key > query.get("start-after", ""):
                head, separator, _ = key[len(prefix) :].partition(delimiter or "\0")
                entries[prefix + head + separator] = bool(separator)
        token = query.get("continuation-token", "")
        after = sorted(entry for entry in entries if entry > token)
        page = after[: self.faults.page]
        more = len(after) > len(page)
        xml = [self._prefix(e) if entries[e] else self._contents(e) for e in page]
        if more:
            xml.append(f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>")
        xml.append(
            f"<KeyCount>{len(page)}</KeyCount><IsTruncated>{str(more).lower()}</IsTruncated>"
        )
        return f"<ListBucketResult><Name>{BUCKET}</Name>{''.join(xml)}</ListBucketResult>"

    def _prefix(self, entry: str) -> str:
        return f"<CommonPrefixes><Prefix>{escape(entry)}</Prefix></CommonPrefixes>"

    def _contents(self, key: str) -> str:
        modified = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(self.modified[key]))
        text = f"<Key>{escape(key)}</Key><LastModified>{modified}</LastModified>"
        text += f"<ETag>{etag(self.objects[key])}</ETag><Size>{len(self.objects[key])}</Size>"
        return f"<Contents>{text}</Contents>"


def etag(body: bytes) -> str:
    return f'"{hashlib.md5(body).hexdigest()}"'


BUCKET_CONTENT = Bucket()


class Handler(BaseHTTPRequestHandler):
    """The handler of a request: its faults, then the behaviour of S3."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits 40 ms for the ACK of its headers

    def log_message(self, *_: Any) -> None:
        """Log nothing: a test asks for the requests that it needs."""

    def do_any(self) -> None:
        bucket = BUCKET_CONTENT
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        first, _, key = unquote(url.path).lstrip("/").partition("/")
        if first == "_control":
            return self.answer(200, json.dumps(bucket.control(key, json.loads(body))))
        faults = bucket.faults
        request = f"{self.command} {key or '?' + url.query}"
        with bucket.lock:
            bucket.requests.append(request)
            fails = faults.failing_in in request and bucket.chance.random() < faults.failing
        time.sleep(faults.latency_seconds)
        while bucket.faults.hanging and bucket.faults.hanging in request:
            time.sleep(0.02)
        if fails:
            return self.refuse(faults.status, "SlowDown")
        with bucket.lock:
            getattr(self, f"on_{self.command.lower()}")(bucket, key, query, body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_any

    def on_get(self, bucket: Bucket, key: str, query: dict[str, str], _: bytes) -> None:
        if "list-type" in query:
            return self.answer(200, bucket.listing(query))
        if key not in bucket.objects:
            return self.refuse(404, "NoSuchKey")
        body = bucket.objects[key]
        modified = formatdate(bucket.modified[key], usegmt=True)
        headers = {"ETag": etag(body), "Last-Modified": modified}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return self.answer(200, body, **headers)
        first = int(asked[1]) if asked[1] else max(len(body) - int(asked[2]), 0)
        end = min(int(asked[2]) + 1, len(body)) if asked[1] and asked[2] else len(body)
        headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(body)}"
        return self.answer(206, body[first:end], **headers)

    on_head = on_get

    def on_put(self, bucket: Bucket, key: str, query: dict[str, str], body: bytes) -> None:
        if "partNumber" in query:
            bucket.uploads[query["uploadId"]][int(query["partNumber"])] = body
            return self.answer(200, ETag=etag(body))
        if source := self.headers.get("x-amz-copy-source"):
            body = bucket.objects[unquote(source).lstrip("/").partition("/")[2]]
        if not bucket.put(key, body, only_new=self.headers.get("If-None-Match") == "*"):
            return self.refuse(412, "PreconditionFailed")
        if bucket.loses_reply(key):
            self.close_connection = not bucket.faults.lost_status
            return None if self.close_connection else self.refuse(bucket.faults.lost_status, "Lost")
        text = f"<CopyObjectResult><ETag>{etag(body)}</ETag></CopyObjectResult>" if source else ""
        return self.answer(200, text, ETag=etag(body))

    def on_post(self, bucket: Bucket, key: str, query: dict[str, str], body: bytes) -> None:
        if "delete" in query:
            keys = re.findall("<Key>.*?</Key>", body.decode())
            for name in keys:
                bucket.objects.pop(unescape(name[5:-6]), None)
            deleted = "".join(f"<Deleted>{name}</Deleted>" for name in keys)
            return self.answer(200, f"<DeleteResult>{deleted}</DeleteResult>")
        if "uploads" in query:
            upload = f"upload-{len(bucket.uploads)}"
            bucket.uploads[upload] = {}
            kind, text = "InitiateMultipartUpload", f"<UploadId>{upload}</UploadId>"
        else:
            parts = bucket.uploads[query["uploadId"]]
            bucket.put(key, b"".join(parts[n] for n in sorted(parts)), only_new=False)
            kind, text = "CompleteMultipartUpload", f"<ETag>{etag(bucket.objects[key])}</ETag>"
        text = f"<Bucket>{BUCKET}</Bucket><Key>{escape(key)}</Key>{text}"
        return self.answer(200, f"<{kind}Result>{text}</{kind}Result>")

    def on_delete(self, bucket: Bucket, key: str, query: dict[str, str], _: bytes) -> None:
        if "uploadId" not in query:
            bucket.objects.pop(key, None)
        self.answer(204)

    def refuse(self, status: int, code: str) -> None:
        key = re.search("Credential=(.*?)/[0-9]{8}/", self.headers.get("Authorization", ""))
        text = f"<Code>{code}</Code><Message>{code}</Message>"
        if key is not None:  # S3 repeats it in its errors
            text += f"<AWSAccessKeyId>{escape(key[1])}</AWSAccessKeyId>"
        self.answer(status, f"<Error>{text}</Error>")

    def answer(self, status: int, body: str | bytes = b"", **headers: str) -> None:
        content = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 200

    def handle_error(self, *request: Any) -> None:
        """Ignore clients that are gone: they were killed."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(*request)


if __name__ == "__main__":
    server = Server(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
