"""A small hub on loopback that speaks the endpoints huggingface_hub asks for: downloading is tested without a network.

Paths, headers and error codes are the real hub's: ``/api/models/{repo}/revision/{rev}``, ``/tree/{rev}``, ``/refs``, and
``/{repo}/resolve/{rev}/{file}`` with HEAD and GET, ETag, X-Repo-Commit, ranges, and large files that are redirected to a
store of their own with X-Linked-Size and X-Linked-ETag.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE = 4096  # bytes; from here on a file lies in the store, as git-lfs has it


@dataclass
class Repo:
    """branches: {name: {path: bytes}}. token: what a reader must bring. gated: the listing is public, the files are not."""

    branches: dict[str, dict[str, bytes]]
    token: str | None = None
    gated: bool = False

    def commit(self, branch: str) -> str:
        text = branch.encode() + b"".join(name.encode() + data for name, data in sorted(self.branches[branch].items()))
        return hashlib.sha1(text).hexdigest()

    def branch_of(self, revision: str) -> str | None:
        """The branch a revision names, or is the commit of."""
        return next((name for name in self.branches if revision in (name, self.commit(name))), None)


@dataclass
class SmallHub:
    """A server in a thread; ``requests`` is what it was asked: (method, path, Range or None).

    break_after: the next download of a longer file ends after so many bytes, as a lost connection does.
    failing: answer everything with this status.
    """

    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    break_after: int | None = None
    failing: int | None = None

    def __enter__(self) -> SmallHub:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def store(self) -> str:
        """Where large files are: another host by name, to which no token may go."""
        return f"http://localhost:{self._server.server_port}/store"

    def downloads(self) -> list[str]:
        """Names of the files whose contents were asked for, in order."""
        return [path.rpartition("/")[2] for method, path, _ in self.requests if method == "GET" and "/api/" not in path]


def branch_of_folder(folder: Path, **more: bytes) -> dict[str, bytes]:
    """A branch that holds the files of a folder, and ``more``."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} | more


class _Handler(BaseHTTPRequestHandler):
    hub: SmallHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        if self.hub.failing:
            return self._refuse(self.hub.failing, "", "the hub has trouble")
        if match := re.fullmatch(r"/store/(\w+)/(.+)", path):
            if self.headers.get("Authorization"):  # the address is signed; a store refuses a second authorisation
                return self._refuse(400, "", "only one authorisation")
            return self._file(self._stored(match[1]), {"ETag": f'"{match[1]}"'}, breaks=True)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree|refs)(?:/(.+))?", path):
            repo, kind, revision = match.groups()
            return self._allowed(repo, api=True) and self._api(self.hub.repos[repo], repo, kind, revision)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo, revision, name = match.groups()
            return self._allowed(repo, api=False) and self._resolve(self.hub.repos[repo], revision, name)
        return self._refuse(404, "", "no such page")

    def _allowed(self, repo: str, api: bool) -> bool:
        known = self.hub.repos.get(repo)
        authorization = self.headers.get("Authorization")
        if authorization and (known is None or authorization != f"Bearer {known.token}"):
            return self._refuse(401, "", "Invalid credentials in Authorization header")
        if known is None or (known.token and not known.gated and not authorization):
            return self._refuse(401, "RepoNotFound", "Repository not found")  # what is private must not show that it exists
        if known.gated and not authorization and not api:
            return self._refuse(403 if self.command == "GET" else 401, "GatedRepo", f"Access to model {repo} is restricted.")
        return True

    def _api(self, repo: Repo, name: str, kind: str, revision: str | None) -> None:
        if kind == "refs":
            branches = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": repo.commit(b)} for b in repo.branches]
            return self._json({"branches": branches, "converts": [], "tags": []})
        branch = repo.branch_of(revision or "main")
        if branch is None:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repo.branches[branch]
        if kind == "tree":
            return self._json([self._entry(path, data) for path, data in sorted(files.items())])
        siblings = [{"rfilename": path} for path in sorted(files)]
        return self._json({"_id": "0", "id": name, "modelId": name, "sha": repo.commit(branch), "private": False,
                           "gated": "auto" if repo.gated else False, "tags": [], "downloads": 0, "likes": 0,
                           "siblings": siblings})  # fmt: skip

    def _entry(self, path: str, data: bytes) -> dict:
        entry = {"type": "file", "path": path, "size": len(data), "oid": _git_id(data)}
        if len(data) >= LARGE:
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return entry

    def _resolve(self, repo: Repo, revision: str, name: str) -> None:
        branch = repo.branch_of(revision)
        if branch is None:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        data, commit = repo.branches[branch].get(name), {"X-Repo-Commit": repo.commit(branch)}
        if data is None:
            return self._refuse(404, "EntryNotFound", "Entry not found", commit)
        if len(data) < LARGE:
            return self._file(data, {**commit, "ETag": f'"{_git_id(data)}"'})
        digest = hashlib.sha256(data).hexdigest()
        linked = {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{digest}"'}
        return self._answer(302, b"", {**commit, **linked, "Location": f"{self.hub.store}/{digest}/{name}"})

    def _stored(self, digest: str) -> bytes:
        every = (data for repo in self.hub.repos.values() for files in repo.branches.values() for data in files.values())
        return next(data for data in every if hashlib.sha256(data).hexdigest() == digest)

    def _file(self, data: bytes, headers: dict[str, str], breaks: bool = False) -> None:
        """The bytes a Range asks for, or all; a download that breaks announces them and then hangs up."""
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(wanted[1]) if wanted else 0
        if wanted:
            headers = {**headers, "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        most = None
        if breaks and self.command == "GET" and self.hub.break_after is not None and self.hub.break_after < len(data):
            most, self.hub.break_after = self.hub.break_after, None
        self._answer(206 if wanted else 200, data[start:], {**headers, "Accept-Ranges": "bytes"}, most)

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> bool:
        reasons = {"X-Error-Code": code, "X-Error-Message": message}
        self._answer(status, json.dumps({"error": message}).encode(), {**reasons, **(headers or {})})
        return False

    def _answer(self, status: int, body: bytes, headers: dict[str, str], most: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if most is None else body[:most])
        if most is not None:
            self.close_connection = True


def _git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
