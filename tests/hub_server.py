"""A stand-in for the Hub on loopback: the part of its HTTP interface that uploads and downloads go through.

Repositories live in memory, in branches of files. Large files go the way of git-lfs: announced, put, then named in the
commit by their hash.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

import yaml


TOKEN = "hf_standin"


class Repository:
    """One repository: whether it is private, and for each branch its files by path."""

    def __init__(self, private: bool):
        self.private = private
        self.branches: dict[str, dict[str, bytes]] = {"main": {}}
        self.commits = 0


class Hub(ThreadingHTTPServer):
    """The server; `with Hub() as hub` runs it in a thread."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def publish(self, name: str, files: dict[str, bytes]) -> None:
        """Puts a public repository there, as if it had been pushed."""
        self.repositories[name] = Repository(private=False)
        self.repositories[name].branches["main"] = dict(files)

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *arguments):
        pass

    def _handle(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlparse(self.path).path)
        for method, pattern, action in _ROUTES:
            match = re.fullmatch(pattern, path)
            if method == self.command and match:
                if action is not _Handler.put_object and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    return self.answer(401, {"error": "Invalid credentials in Authorization header"})
                return action(self, body, *match.groups())
        return self.answer(404, {"error": f"no route for {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = _handle  # noqa: N815 - the names that the base class calls

    def answer(self, status, content, headers=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def files(self, name, revision):
        """The files of a branch or of a commit, which here is the branch's name in hexadecimal; None if unknown."""
        repository = self.server.repositories.get(name)
        if repository is None:
            self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        branch = next((branch for branch in repository.branches if revision in (branch, commit_id(branch))), None)
        if branch is None:
            self.answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
            return None
        return repository.branches[branch]

    def create(self, body):
        wanted = json.loads(body)
        name = "/".join(part for part in (wanted.get("organization") or "me", wanted["name"]) if part)
        url = f"{self.server.url}/{name}"
        if name in self.server.repositories:
            return self.answer(409, {"error": "You already created this model repo", "url": url})
        private = wanted.get("visibility") == "private" or wanted.get("private") is True
        self.server.repositories[name] = Repository(private)
        return self.answer(200, {"url": url, "name": name})

    def branch(self, body, name, branch):
        repository = self.server.repositories[name]
        if branch in repository.branches:
            return self.answer(409, {"error": "Reference already exists"})
        repository.branches[branch] = dict(repository.branches["main"])
        return self.answer(201, {})

    def validate_yaml(self, body):
        content = json.loads(body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        try:
            metadata = yaml.safe_load(match[1]) if match else None
        except yaml.YAMLError as error:
            return self.answer(400, {"errors": [{"message": str(error)}], "warnings": []})
        missing = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        return self.answer(200, {"errors": [], "warnings": missing})

    def preupload(self, body, name, revision):
        files = self.files(name, revision)
        if files is not None:
            answers = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self.answer(200, {"files": answers})

    def batch(self, body, name):
        objects = [
            {
                "oid": entry["oid"],
                "size": entry["size"],
                "actions": {}
                if entry["oid"] in self.server.objects
                else {"upload": {"href": f"{self.server.url}/objects/{entry['oid']}"}},
            }
            for entry in json.loads(body)["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def put_object(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer(400, {"error": "the content has another hash"})
        self.server.objects[oid] = body
        return self.answer(200, b"")

    def commit(self, body, name, revision):
        files = self.files(name, revision)
        if files is None:
            return
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        self.server.repositories[name].commits += 1
        oid = commit_id(revision)
        self.answer(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{name}/commit/{oid}"})

    def info(self, body, name, revision="main"):
        files = self.files(name, revision)
        if files is not None:
            siblings = [{"rfilename": path, "size": len(content)} for path, content in files.items()]
            sha = revision if re.fullmatch("[0-9a-f]{40}", revision) else commit_id(revision)
            self.answer(200, {"id": name, "modelId": name, "sha": sha, "siblings": siblings, "private": False})

    def tree(self, body, name, revision):
        files = self.files(name, revision)
        if files is not None:
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in files.items()
            ]
            self.answer(200, entries)

    def resolve(self, body, name, revision, path):
        files = self.files(name, revision)
        if files is None:
            return
        if path not in files:
            self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        etag = hashlib.sha256(files[path]).hexdigest()
        sha = revision if re.fullmatch("[0-9a-f]{40}", revision) else commit_id(revision)
        self.answer(200, files[path], {"ETag": f'"{etag}"', "X-Repo-Commit": sha})


def commit_id(branch: str) -> str:
    """The commit that a branch is at: one for each branch is enough here."""
    return hashlib.sha1(branch.encode()).hexdigest()


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", rf"/api/models/{_NAME}/branch/(.+)", _Handler.branch),
    ("POST", rf"/api/models/{_NAME}/preupload/(.+)", _Handler.preupload),
    ("POST", rf"/api/models/{_NAME}/commit/(.+)", _Handler.commit),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", "/objects/([0-9a-f]{64})", _Handler.put_object),
    ("GET", rf"/api/models/{_NAME}", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/revision/(.+)", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/tree/([^/]+)", _Handler.tree),
    ("HEAD", rf"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
    ("GET", rf"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
