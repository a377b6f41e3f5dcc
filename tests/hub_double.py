"""A stand-in for the Hugging Face Hub on this machine: what is pushed to it can be loaded from it.

It speaks as much of the Hub's language as huggingface-hub 2.4 needs to create repositories, commit to them (regular
and LFS files) and read them. Everything is kept in memory; any token is welcome, but there has to be one to write.
"""

import base64
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit


class HubDouble(ThreadingHTTPServer):
    """
    Serves from a thread of its own within `with HubDouble() as hub`.

    Attributes:
        repos: `"models/user/name"` -> path -> content. `"models/user/name@<commit>"` are the earlier commits.
        requests: `"METHOD /path"` of everything that was asked.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, dict[str, bytes]] = {}
        self.uploads: dict[str, bytes] = {}  # LFS objects by their SHA-256
        self.variables: dict[str, dict[str, str]] = {}  # of Spaces
        self.requests: list[str] = []

    def __enter__(self) -> "HubDouble":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Variables of a process that takes this for the Hub and has its cache in the folder `home`."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHONPATH"))}
        own = {"HF_ENDPOINT": self.url, "HF_TOKEN": "hf_double", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
        return {**kept, **own, "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


def head_of(files: dict[str, bytes]) -> str:
    """The commit that these files make up."""
    digest = hashlib.sha1()
    for path in sorted(files):
        digest.update(path.encode() + b"\0" + hashlib.sha1(files[path]).digest())
    return digest.hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubDouble

    def log_message(self, *args):
        pass

    def answer(self, content, status: int = 200, **headers: str):
        """Sends bytes as they are, anything else as JSON. (`X_Repo_Commit=...` is the header `X-Repo-Commit`.)"""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str, **headers: str):
        self.answer({"error": code}, status, X_Error_Code=code, X_Error_Message=code, **headers)

    def find(self, repo: str, revision: str) -> dict[str, bytes] | None:
        """The files of a repository, or None after an answer that says what is missing."""
        repos = self.server.repos
        files = repos.get(repo if revision in ("main", "HEAD") else f"{repo}@{revision}")
        if files is None:
            self.refuse(404, "RevisionNotFound" if repo in repos else "RepoNotFound")
        return files

    def handle_request(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        if self.command == "POST" and not self.headers.get("Authorization"):
            return self.refuse(401, "Unauthorized")
        for method, pattern, function in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                return function(self, body, **match.groupdict())
        self.answer({"error": f"the double does not know {self.command} {path}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def create(self, body: bytes):
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        kind = wanted.get("type") or "model"
        repo = f"{kind}s/{name}"
        url = f"{self.server.url}/{name if kind == 'model' else repo}"
        if repo in self.server.repos:
            return self.answer({"error": "it exists", "url": url}, 409)
        self.server.repos[repo] = self.server.repos[f"{repo}@{head_of({})}"] = {}
        self.answer({"url": url, "name": name})

    def variables(self, body: bytes, repo: str):
        of_space = self.server.variables.setdefault(repo, {})
        if self.command == "POST":
            entry = json.loads(body)
            of_space[entry["key"]] = entry["value"]
        elif self.command == "DELETE":
            del of_space[json.loads(body)["key"]]
        self.answer({key: {"key": key, "value": value} for key, value in of_space.items()})

    def validate_card(self, body: bytes):
        self.answer({"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo: str, revision: str):
        self.answer(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".parquet")) else "regular",
                        "shouldIgnore": False,
                        "oid": None,
                    }
                    for file in json.loads(body)["files"]
                ]
            }
        )

    def lfs_batch(self, body: bytes, repo: str):
        objects = json.loads(body)["objects"]
        for entry in objects:
            entry["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{entry['oid']}"}}
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_upload(self, body: bytes, oid: str):
        if hashlib.sha256(body).hexdigest() != oid:
            return self.refuse(400, "BadOid")
        self.server.uploads[oid] = body
        self.answer({})

    def commit(self, body: bytes, repo: str, revision: str):
        files = self.find(repo, revision)
        if files is None:
            return
        files = dict(files)
        for line in map(json.loads, body.splitlines()):
            kind, value = line["key"], line["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.server.uploads[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
            elif kind == "deletedFolder":
                files = {path: data for path, data in files.items() if not path.startswith(value["path"])}
        commit = head_of(files)
        self.server.repos[repo] = self.server.repos[f"{repo}@{commit}"] = files
        url = f"{self.server.url}/{repo.removeprefix('models/')}/commit/{commit}"
        self.answer({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def info(self, body: bytes, repo: str, revision: str | None):
        files = self.find(repo, revision or "main")
        if files is not None:
            siblings = [{"rfilename": path} for path in sorted(files)]
            name = repo.split("/", 1)[1]
            self.answer({"id": name, "sha": head_of(files), "siblings": siblings, "tags": [], "private": False})

    def tree(self, body: bytes, repo: str, revision: str, folder: str | None):
        files = self.find(repo, revision)
        if files is None:
            return
        prefix = f"{folder.strip('/')}/" if folder and folder.strip("/") else ""
        inside = sorted(path for path in files if path.startswith(prefix))
        folders = sorted({str(parent) for path in inside for parent in PurePosixPath(path).parents[:-1]})
        entries = [
            {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}
            for path in folders
            if path.startswith(prefix)
        ]
        entries += [
            {"type": "file", "path": path, "size": len(files[path]), "oid": hashlib.sha1(files[path]).hexdigest()}
            for path in inside
        ]
        if parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() != "true":
            entries = [entry for entry in entries if "/" not in entry["path"].removeprefix(prefix)]
        if prefix and not entries:
            return self.refuse(404, "EntryNotFound", X_Repo_Commit=head_of(files))
        self.answer(entries)

    def resolve(self, body: bytes, kind: str | None, name: str, revision: str, file: str):
        files = self.find(f"{kind or 'models'}/{name}", revision)
        if files is None:
            return
        commit = head_of(files)
        if file not in files:
            return self.refuse(404, "EntryNotFound", X_Repo_Commit=commit)
        self.answer(files[file], ETag=f'"{hashlib.sha256(files[file]).hexdigest()}"', X_Repo_Commit=commit)


_REPO = r"(?P<repo>(models|datasets|spaces)/[^/]+/[^/]+)"
ROUTES = [
    (("POST",), "/api/repos/create", _Handler.create),
    (("POST",), "/api/validate-yaml", _Handler.validate_card),
    (("GET", "POST", "DELETE"), f"/api/{_REPO}/variables", _Handler.variables),
    (("POST",), f"/api/{_REPO}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    (("POST",), f"/api/{_REPO}/commit/(?P<revision>[^/]+)", _Handler.commit),
    (("POST",), r"/(?P<repo>.+)\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (("PUT",), "/lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_upload),
    (("GET",), f"/api/{_REPO}(/revision/(?P<revision>[^/]+))?", _Handler.info),
    (("GET",), f"/api/{_REPO}/tree/(?P<revision>[^/]+)(/(?P<folder>.*))?", _Handler.tree),
    (("GET",), "/api/agent-harnesses", lambda handler, body: handler.answer({"harnesses": []})),
    (
        ("GET", "HEAD"),
        r"/((?P<kind>datasets|spaces)/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)",
        _Handler.resolve,
    ),
]
