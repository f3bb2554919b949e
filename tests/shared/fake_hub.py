"""A small Hub over HTTP, for tests: the documented endpoints that pushing and pulling models use, kept in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

WRITER, READER = "hf_writer", "hf_reader"  # the tokens it knows


class FakeHub(ThreadingHTTPServer):
    """commits: of each repository, the files by name for each commit; ``main`` is the last.  blobs: of LFS, by SHA-256.

    private: repositories that need a token.  fault: what goes wrong with the adapter file on its way down: "cut" ends
    the connection half-way, "stall" waits there, "spoil" changes a byte.  asked: lines of requests.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.blobs: dict[str, bytes] = {}
        self.private: set[str] = set()
        self.fault, self.asked = "", []
        self.stalled, self.go_on = threading.Event(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, repository: str, files: dict[str, bytes]) -> str:
        """One more commit, with these files beside those before; its hash."""
        commits = self.commits.setdefault(repository, {})
        after = {**(list(commits.values())[-1] if commits else {}), **files}
        sha = hashlib.sha1(repr((len(commits), sorted(after.items()))).encode()).hexdigest()
        commits[sha] = after
        return sha

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is what some tests are about."""


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        self.server.asked.append(self.requestline)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/blobs/([0-9a-f]{64})", path):
            return self._file(self.server.blobs[found[1]], {"ETag": f'"{found[1]}"'}, faulty=True)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?/?", path):
            if (files := self._files(found[1], found[3] or "main")) is None:
                return None
            sha, there = files
            tree = [self._entry(name, data) for name, data in there.items()]
            siblings = [{"rfilename": name} for name in there]
            return self._json(tree if found[2] == "tree" else {"id": found[1], "sha": sha, "siblings": siblings})
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if (files := self._files(found[1], found[2])) is None:
                return None
            sha, there = files
            if found[3] not in there:
                return self._refuse(404, "EntryNotFound")
            data, entry = there[found[3]], self._entry(found[3], there[found[3]])
            headers = {"X-Repo-Commit": sha}
            if "lfs" not in entry:
                return self._file(data, headers | {"ETag": f'"{entry["oid"]}"'})
            oid = entry["lfs"]["oid"]
            self.server.blobs[oid] = data
            elsewhere = self.server.url.replace("127.0.0.1", "localhost")  # the true Hub sends to another host as well
            linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data))}
            return self._reply(302, b"", {**headers, **linked, "Location": f"{elsewhere}/blobs/{oid}"})
        return self._refuse(404, "")

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self._body()
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token != WRITER:
            return self._refuse(403 if token == READER else 401, "")
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            there = name in self.server.commits
            self.server.commits.setdefault(name, {})
            if asked.get("private") or asked.get("visibility") == "private":
                self.server.private.add(name)
            return self._json({"url": f"{self.server.url}/{name}"}, 409 if there else 200)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path):
            return self._preupload(json.loads(body)) if found[2] == "preupload" else self._commit(found[1], body)
        if re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            objects = json.loads(body)["objects"]
            for each in objects:
                each["actions"] = {"upload": {"href": f"{self.server.url}/blobs/{each['oid']}"}}
            return self._json({"transfer": "basic", "objects": objects})
        return self._refuse(404, "")

    def do_PUT(self) -> None:
        data = self._body()
        oid = hashlib.sha256(data).hexdigest()
        if not self.path.endswith(oid):
            return self._refuse(400, "")
        self.server.blobs[oid] = data
        return self._reply(200, b"")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _preupload(self, asked: dict[str, Any]) -> None:
        def answer(name: str) -> dict[str, Any]:
            mode = "lfs" if name.endswith(".safetensors") else "regular"
            return {"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": None}

        return self._json({"files": [answer(file["path"]) for file in asked["files"]]})

    def _commit(self, repository: str, body: bytes) -> None:
        files = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
        sha = self.server.commit(repository, files)
        self._json({"commitUrl": f"{self.server.url}/{repository}/commit/{sha}", "commitOid": sha, "success": True})

    def _files(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.server.commits.get(repository)
        if not commits or (repository in self.server.private and "Authorization" not in self.headers):
            self._refuse(401, "RepoNotFound")
            return None
        sha = list(commits)[-1] if revision == "main" else revision
        if sha not in commits:
            self._refuse(404, "RevisionNotFound")
            return None
        return sha, commits[sha]

    def _entry(self, name: str, data: bytes) -> dict[str, Any]:
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": oid}
        if name.endswith(".safetensors"):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry

    def _file(self, data: bytes, headers: dict[str, str], *, faulty: bool = False) -> None:
        first = int(found[1]) if (found := re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))) else 0
        if faulty and self.server.fault == "spoil":
            data = data[:-1] + bytes([data[-1] ^ 1])
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        for name, value in {**headers, "Content-Length": str(len(data) - first)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if faulty and self.server.fault in ("cut", "stall"):
            self.wfile.write(data[first : first + 1])
            self.wfile.flush()
            self.server.stalled.set()
            if self.server.fault == "stall":
                self.server.go_on.wait(60)
            self.close_connection = True
            return
        self.wfile.write(data[first:])

    def _json(self, value: Any, status: int = 200) -> None:
        self._reply(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str) -> None:
        self._reply(status, b'{"error": "refused"}', {"X-Error-Code": code, "Content-Type": "application/json"})

    def _reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
