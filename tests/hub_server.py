"""A Hugging Face Hub on the loopback: the few routes that pushing, loading and browsing a model use.

    with HubServer() as hub:
        hub.seed("user/tiny", {"config.json": b"{}"})
        subprocess.run([sys.executable, "push.py"], env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": ...})
        assert "adapter_config.json" in hub.files("user/tiny")

`huggingface_hub` reads both variables when it is imported, hence the subprocess. Tokens are not checked. Uploads are
always "regular", their content inside the commit: no LFS, no xet. Whatever else the real Hub has (pull requests,
tags, datasets) is a 404 that names the missing route.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from types import MappingProxyType
from typing import Any, NamedTuple, final
from urllib.parse import unquote

__all__ = ["Commit", "HubError", "HubServer"]


class Commit(NamedTuple):
    """One state of a repo: its sha, its message, and content by path."""

    sha: str
    message: str
    files: dict[str, bytes]


@final
class HubServer:
    """Model repos in memory, served at `url` while the `with` block lasts.

    `repos` holds each repo's commits on main, oldest first; as on the Hub the first is of its creation (here without
    files). `branches` holds those of other branches, by repo and name; `private` the repos that are; `requests`
    what was asked, in order.
    """

    def __init__(self) -> None:
        self.repos: dict[str, list[Commit]] = {}
        self.branches: dict[tuple[str, str], list[Commit]] = {}
        self.private: set[str] = set()
        self.requests: list[str] = []
        self.lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), partial(_Handler, self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def seed(self, repo: str, files: Mapping[str, bytes], message: str = "seed") -> Commit:
        """Add `files` to main in one commit, creating the repo if need be."""
        with self.lock:
            if repo not in self.repos:
                self.append(repo, "initial commit", {})
            return self.append(repo, message, {**self.at(repo).files, **files})

    def commits(self, repo: str) -> list[Commit]:
        """The commits of `repo`, oldest first; the first is its empty creation."""
        return list(self.repos[repo])

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Content by path at `revision`."""
        return dict(self.at(repo, revision).files)

    def at(self, repo: str, revision: str = "main") -> Commit:
        """The commit at `revision`, which is "main", another branch or a full sha."""
        if repo not in self.repos:
            raise HubError(404, "Repository not found", {"X-Error-Code": "RepoNotFound"})
        named = {"main": self.repos[repo]}
        named |= {branch: history for (name, branch), history in self.branches.items() if name == repo}
        if revision in named:
            return named[revision][-1]
        found = [commit for history in named.values() for commit in history if commit.sha == revision]
        if not found:
            raise HubError(404, f"Invalid rev id: {revision}", {"X-Error-Code": "RevisionNotFound"})
        return found[0]

    def append(self, repo: str, message: str, files: dict[str, bytes], branch: str = "main") -> Commit:
        """Make `files` the new state of a branch of `repo`; the caller holds `lock`."""
        history = self.repos.setdefault(repo, []) if branch == "main" else self.branches[repo, branch]
        state = branch, len(history), message, [(path, blob_id(data)) for path, data in files.items()]
        sha = hashlib.sha1(repr(state).encode()).hexdigest()
        history.append(Commit(sha, message, files))
        return history[-1]


NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class Reply(NamedTuple):
    """What goes back; a body other than bytes goes as JSON."""

    body: object
    headers: Mapping[str, str] = NO_HEADERS
    status: int = 200


class HubError(Exception):
    """A refusal. The client picks its exception by the header `X-Error-Code`, not by the status."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] = NO_HEADERS, **body: str) -> None:
        super().__init__(message)
        self.reply = Reply({"error": message, **body}, {"X-Error-Message": message, **headers}, status)


def blob_id(data: bytes) -> str:
    """Git's id of a file's content, which the Hub also uses as its ETag."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


# One function per route: the request's body and the named parts of its path in, a reply out.


def create_repo(hub: HubServer, body: bytes) -> Reply:
    """Refuses a repo that exists with the 409 that `exist_ok=True` forgives."""
    wanted = json.loads(body)
    repo = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
    url = f"{hub.url}/{repo}"
    if repo in hub.repos:
        raise HubError(409, "You already created this model repo", url=url)
    hub.append(repo, "initial commit", {})
    if wanted.get("private") or wanted.get("visibility") == "private":
        hub.private.add(repo)
    return Reply({"url": url, "id": repo, "name": repo})


def create_branch(hub: HubServer, body: bytes, repo: str, branch: str) -> Reply:
    """A branch with the history of main; one that exists is refused with the 409 that `exist_ok=True` forgives."""
    if (repo, branch) in hub.branches or branch == "main":
        raise HubError(409, "Reference already exists")
    hub.at(repo)  # refuses a repo that does not exist
    hub.branches[repo, branch] = hub.commits(repo)
    return Reply({})


def preupload(hub: HubServer, body: bytes, repo: str, rev: str) -> Reply:
    """Says how to send each file, and the `oid` of what is there: the client leaves out what has not changed."""
    oids = {path: blob_id(data) for path, data in hub.at(repo, rev).files.items()}
    paths = [file["path"] for file in json.loads(body)["files"]]
    how = {"uploadMode": "regular", "shouldIgnore": False}
    return Reply({"files": [{"path": path, "oid": oids.get(path), **how} for path in paths]})


def commit(hub: HubServer, body: bytes, repo: str, rev: str) -> Reply:
    """One JSON object a line: a header, then the files added or deleted. `rev` is a branch."""
    files, message = hub.files(repo, rev), ""
    for item in map(json.loads, body.splitlines()):
        match item:
            case {"key": "header", "value": {"summary": message}}:
                pass
            case {"key": "file", "value": {"path": path, "content": content, "encoding": "base64"}}:
                files[path] = base64.b64decode(content)
            case {"key": "deletedFile", "value": {"path": path}} if path in files:
                del files[path]
            case {"key": "deletedFile"}:
                raise HubError(404, "A file with this name doesn't exist", {"X-Error-Code": "EntryNotFound"})
            case _:
                raise HubError(400, f"HubServer cannot commit a {item['key']}")
    sha = hub.append(repo, message, files, rev).sha
    return Reply({"success": True, "commitOid": sha, "commitUrl": f"{hub.url}/{repo}/commit/{sha}", "hookOutput": ""})


def model_info(hub: HubServer, body: bytes, repo: str, rev: str) -> Reply:
    """Chiefly the sha that `rev` stands for."""
    sha, _, files = hub.at(repo, rev)
    siblings = [{"rfilename": path} for path in sorted(files)]
    private = repo in hub.private
    return Reply({"id": repo, "sha": sha, "siblings": siblings, "tags": [], "private": private, "gated": False})


def tree(hub: HubServer, body: bytes, repo: str, rev: str) -> Reply:
    """Every file, in one page and without the folders."""
    files = sorted(hub.files(repo, rev).items())
    return Reply([{"type": "file", "path": path, "oid": blob_id(data), "size": len(data)} for path, data in files])


def resolve(hub: HubServer, body: bytes, repo: str, rev: str, path: str) -> Reply:
    """A file's content, with the two headers the client's cache is keyed by."""
    sha, _, files = hub.at(repo, rev)
    if path not in files:
        raise HubError(404, "Entry not found", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
    return Reply(files[path], {"ETag": f'"{blob_id(files[path])}"', "X-Repo-Commit": sha})


REPO, REV = "(?P<repo>[^/?]+/[^/?]+)", "(?P<rev>[^/?]+)"
ROUTES: dict[str, Callable[..., Reply]] = {
    "POST /api/repos/create": create_repo,
    "POST /api/validate-yaml": lambda hub, body: Reply({"errors": [], "warnings": []}),
    f"POST /api/models/{REPO}/preupload/{REV}": preupload,
    f"POST /api/models/{REPO}/branch/(?P<branch>[^/?]+)": create_branch,
    f"POST /api/models/{REPO}/commit/{REV}": commit,
    f"GET /api/models/{REPO}(?:/revision/{REV})?": model_info,
    rf"GET /api/models/{REPO}/tree/{REV}\?recursive=true&expand=false": tree,
    f"(?:GET|HEAD) /{REPO}/resolve/{REV}/(?P<path>[^?]+)": resolve,
}


def answer(hub: HubServer, request: str, body: bytes) -> Reply:
    """The reply to `request`, a method and a target such as "GET /api/models/user/tiny"."""
    for pattern, route in ROUTES.items():
        if found := re.fullmatch(pattern, request):
            parts = found.groupdict(default="main")
            return route(hub, body, **{name: unquote(part) for name, part in parts.items()})
    raise HubError(404, f"HubServer has no route for {request}")


class _Server(ThreadingHTTPServer):
    request_queue_size = 64

    def server_bind(self) -> None:
        """Bind without the DNS query by which `HTTPServer` learns its own name."""
        TCPServer.server_bind(self)


class _Handler(BaseHTTPRequestHandler):
    """Speaks HTTP/1.0, the default: one connection per request, so that none outlives the server."""

    def __init__(self, hub: HubServer, *args: Any) -> None:
        self.hub = hub
        super().__init__(*args)

    def serve(self) -> None:
        body = b"".join(self.chunks())
        try:
            with self.hub.lock:
                self.hub.requests.append(f"{self.command} {self.path}")
                reply = answer(self.hub, f"{self.command} {self.path}", body)
        except HubError as error:
            reply = error.reply
        data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_POST = serve

    def chunks(self) -> Iterator[bytes]:
        """The request's body, which has no length when the client streams it."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            yield self.rfile.read(int(self.headers.get("Content-Length", 0)))
            return
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""
