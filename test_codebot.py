"""codebot from outside: its commands, its HTTP, its files, and what git and GitHub see.

Nothing is mocked, things are stood up (see Stand): repositories by git, keys by openssl,
a GitHub on loopback, a `claude` that obeys a small plan, and codebot as its own process.
A test that needs settings or a restart has a stand of its own (stand); all others share a
server, with a repository of their own there (shared).

    python -m pytest            needs pytest only; -n 4 and any order will do
"""

from __future__ import annotations

import ast
import base64
import concurrent.futures
import contextlib
import email.utils
import errno
import hashlib
import hmac
import http.client
import http.server
import inspect
import itertools
import json
import logging
import os
import re
import select
import shutil
import signal
import socket
import sqlite3
import ssl
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import codebot

HERE = Path(__file__).resolve().parent
PROGRAM = HERE / "codebot.py"
KEY, MODEL_KEY, HOOK_SECRET = "the-key-of-a-client", "sk-ant-of-the-model", "secret-of-the-hook"
NAME = "acme/widget"
BOT = {"login": "acme-bot[bot]", "id": 77, "type": "Bot"}
EVENTS = {"issue": "issue_comment", "inline": "pull_request_review_comment"}
EVENTS |= {"review": "pull_request_review"}  # what GitHub calls what was said
RIGHTS = {"alice": "write", "bob": "admin", "carol": "read"}  # of people on GitHub
CSP = "Content-Security-Policy"
GIT = {
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_NOSYSTEM": "1",
    **{f"GIT_{who}_NAME": "Ada" for who in ("AUTHOR", "COMMITTER")},
    **{f"GIT_{who}_EMAIL": "ada@example.com" for who in ("AUTHOR", "COMMITTER")},
}


# ---- The stand --------------------------------------------------------------------


def wait_for(condition: Callable[[], Any], seconds: float = 20) -> Any:
    """What CONDITION gives, once it is true; it has some seconds for that."""
    until, tick, pause = time.monotonic() + seconds, threading.Event(), 0.005
    while not (value := condition()):
        assert time.monotonic() < until, "it did not come about in time"
        tick.wait(pause)
        pause = min(pause * 1.1, 0.03)  # each look takes time from those that are waited for
    return value


def sh(*argv: str, cwd: Path | None = None, check: bool = True, **env: str) -> str:
    """The output of a program that has to succeed."""
    env = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "LC_ALL": "C.UTF-8", **GIT, **env}
    done = subprocess.run(argv, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or not check, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


BACKEND = f"{sh('git', '--exec-path')}/git-http-backend"


def bwrap_runs() -> bool:
    argv = ["bwrap", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--unshare-pid"]
    with contextlib.suppress(FileNotFoundError):
        return subprocess.run([*argv, "true"], capture_output=True, check=False).returncode == 0
    return False


needs_bwrap = pytest.mark.skipif(not bwrap_runs(), reason="bwrap does not run here")
as_user = pytest.mark.skipif(os.getuid() == 0, reason="root may read and write everything")


class Refused(Exception):
    """The stand-in GitHub says no."""


class Hold:
    """A place where the stand-in GitHub waits until the test lets it go on."""

    def __init__(self) -> None:
        self.reached, self.go = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        self.go.wait(30)


class Hub(http.server.ThreadingHTTPServer):
    """GitHub on loopback: an App's REST API, and git's smart HTTP by `git http-backend`."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, top: Path, public_key: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answerer)
        self.top, self.public_key = top, public_key
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.calls: list[str] = []  # "GET /app", git's too
        self.minted: list[Any] = []  # bodies of requests for tokens
        self.tokens: dict[str, list[str] | None] = {}  # token: names, or all
        self.jwts: dict[str, Any] = {}
        self.pulls: list[dict[str, Any]] = []
        self.said: list[dict[str, Any]] = []  # on pull requests: comments of both kinds, reviews
        self.ids = {kind: itertools.count(101) for kind in EVENTS}  # the same ones, as on GitHub
        self.eyes: list[tuple[str, int]] = []
        self.rights = dict(RIGHTS)
        self.events = [*EVENTS.values(), "pull_request"]
        self.page, self.unchanged = 100, 0  # entries of one page at most; answers 304
        self.renamed: dict[str, str] = {}
        self.permissions = dict.fromkeys(("contents", "pull_requests", "issues"), "write")
        self.faults: list[tuple[str, str, Any]] = []  # pattern, when, what
        self.holds: list[Hold] = []
        self.skew, self.sent = 0.0, 0  # our clock's; bytes of git answered
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,))
        self.thread.start()

    def close(self) -> None:
        self.release()
        self.shutdown()
        self.thread.join()
        self.server_close()

    def fault(self, pattern: str, *whats: Any, when: str = "before") -> None:
        """For each of WHATS, one call that matches meets it: a call, or (status, body, headers)."""
        self.faults.extend((pattern, when, what) for what in whats)

    def hold(self, pattern: str, when: str = "before") -> Hold:
        hold = Hold()
        self.holds.append(hold)
        self.fault(pattern, hold, when=when)
        return hold

    def release(self) -> None:
        for hold in self.holds:
            hold.go.set()

    def forget(self) -> None:
        self.release()
        self.rights = dict(RIGHTS)
        past: list[list[Any]] = [self.calls, self.minted, self.said, self.eyes, self.faults]
        for told in past:
            told.clear()

    def count(self, pattern: str) -> int:
        return sum(bool(re.match(pattern, call)) for call in self.calls)

    def repositories(self) -> list[str]:
        found = self.top.glob("*/*.git")
        return [str(path.relative_to(self.top))[:-4] for path in found]

    def check_jwt(self, jwt: str) -> None:
        if jwt not in self.jwts:
            signed, _, signature = jwt.rpartition(".")
            file = self.top / f"signature-{len(self.jwts)}"
            file.write_bytes(base64.urlsafe_b64decode(signature + "=="))
            argv = ["openssl", "dgst", "-sha256", "-verify", str(self.public_key)]
            argv += ["-signature", str(file)]
            good = subprocess.run(argv, input=signed.encode(), capture_output=True, check=False)
            if good.returncode:
                raise Refused(401, "A JSON web token could not be decoded")
            self.jwts[jwt] = json.loads(base64.urlsafe_b64decode(signed.split(".")[1] + "=="))
        claims, now = self.jwts[jwt], time.time() + self.skew
        if not claims["iat"] <= now < claims["exp"] <= now + 600 or claims["iss"] != "12345":
            raise Refused(401, "'Expiration time' claim ('exp') is too far in the future")

    def check_token(self, token: str, name: str) -> None:
        if token not in self.tokens:
            raise Refused(401, "Bad credentials")
        names = self.tokens[token]
        if names is not None and name.split("/")[1] not in names:
            raise Refused(404, "Not Found")

    def rest(self, method: str, path: str, query: str, token: str, body: Any) -> Any:
        """Status, value and headers of one call of the API."""
        if path == "/app":
            self.check_jwt(token)
            return 200, {"slug": "acme-bot", "name": "Acme Bot"}
        if path.startswith("/app/installations/"):
            self.check_jwt(token)
            if method == "GET":
                given = {"permissions": self.permissions, "events": self.events}
                return 200, {"account": {"login": "acme"}, **given}
            self.minted.append(body)
            names = body.get("repositories")
            known = [name.split("/")[1] for name in self.repositories() if name not in self.renamed]
            if not set(names or ()) <= set(known):
                raise Refused(422, "There is at least one repository that does not exist")
            token = f"ghs_12345_{os.urandom(30).hex()}"
            self.tokens[token] = names
            return 201, {"token": token, "expires_at": "2099-01-01T00:00:00Z"}
        if path == "/users/acme-bot%5Bbot%5D":
            return 200, BOT
        if path == "/repositories/1":
            return 200, {"full_name": next(iter(self.renamed.values()))}
        name = "/".join(path.split("/")[2:4])
        rest = path[len(f"/repos/{name}") :]
        if name in self.renamed:
            return 301, {"message": "Moved Permanently"}, {"Location": f"{self.url}/repositories/1"}
        self.check_token(token, name)
        if name not in self.repositories():
            raise Refused(404, "Not Found")
        if not rest:
            return 200, {"full_name": name}
        if rest != "/pulls":
            return self.conversation(method, path, rest[1:].split("/"), query, body)
        return self.pull(name, body) if method == "POST" else self.found(name, query)

    def say(self, kind: str, on: int, user: Any, text: str, **more: Any) -> dict[str, Any]:
        """Keep what a person, or codebot, said on a pull request."""
        user = {"login": user, "id": 5, "type": "User"} if isinstance(user, str) else user
        said = {"kind": kind, "on": on, "id": next(self.ids[kind]), "user": user, "body": text}
        times = ("submitted_at",) if kind == "review" else ("created_at", "updated_at")
        said |= {**dict.fromkeys(times, codebot.now_text()), **more}
        self.said.append(said)
        return said

    def heard(self, kind: str, number: str) -> dict[str, Any]:
        for said in self.said:
            if (said["kind"], said["id"]) == (kind, int(number)):
                return said
        raise Refused(404, "Not Found")

    def conversation(self, method: str, path: str, at: list[str], query: str, body: Any) -> Any:
        """One pull request, what is said on it, and what those who say it may do."""
        kind = {"issues": "issue", "pulls": "review" if "reviews" in at else "inline"}.get(at[0])
        if at[0] == "collaborators":
            if at[1] not in self.rights:
                raise Refused(404, "Not Found")
            return 200, {"permission": self.rights[at[1]]}
        if at[-1] == "reactions":
            said = self.heard(str(kind), at[2])
            self.eyes.append((said["kind"], said["id"]))
            return 201, {}
        pull = self.pulls[int(at[1]) - 1]
        if len(at) == 2:
            pull.update(body)
            return 200, pull
        if at[-1] == "replies":
            top = self.heard("inline", at[3])
            if "in_reply_to_id" in top:
                raise Refused(404, "Not Found")
            return 201, self.say("inline", int(at[1]), BOT, body["body"], in_reply_to_id=top["id"])
        if method == "POST":
            return 201, self.say(str(kind), int(at[1]), BOT, body["body"])
        if len(at) == 4:
            return 200, self.heard("review", at[3])
        given = dict(urllib.parse.parse_qsl(query))
        found = [s for s in self.said if (s["kind"], s["on"]) == (kind, int(at[1]))]
        if len(at) == 5:
            found = [s for s in self.said if s.get("pull_request_review_id") == int(at[3])]
        elif kind != "review":
            found = [s for s in found if s["updated_at"] >= given.get("since", "")]
        number, size = int(given.get("page", 1)), min(self.page, int(given.get("per_page", 30)))
        following = f'<{self.url}{path}?{query}&page={number + 1}>; rel="next"'
        headers = {"Link": following} if len(found) > number * size else {}
        return 200, found[(number - 1) * size : number * size], headers

    def found(self, name: str, query: str) -> Any:
        wanted = dict(urllib.parse.parse_qsl(query)).get("head", "").partition(":")[2]
        mine = [pull for pull in self.pulls if pull["name"] == name]
        return 200, [pull for pull in mine if wanted in ("", pull["head"]["ref"])]

    def pull(self, name: str, body: Any) -> Any:
        refs = (f"refs/heads/{body[end]}" for end in ("head", "base"))
        sh("git", "-C", str(self.top / f"{name}.git"), "rev-parse", *refs)
        with self.lock:
            if any(p["head"]["ref"] == body["head"] and p["name"] == name for p in self.pulls):
                errors = [{"message": f"A pull request already exists for acme:{body['head']}."}]
                return 422, {"message": "Validation Failed", "errors": errors}
            number = len(self.pulls) + 1
            pull = {**body, "name": name, "number": number, "state": "open"}
            repository = {"id": 1, "full_name": name}
            pull |= {"head": {"ref": body["head"], "repo": repository}, "locked": False}
            pull |= {"base": {"ref": body["base"], "repo": repository}, "merged": False}
            pull |= {"created_at": "2026-01-01T00:00:00Z"}
            pull["html_url"] = f"{self.url}/{name}/pull/{number}"
            self.pulls.append(pull)
        return 201, pull

    def git(self, method: str, path: str, query: str, headers: Any, body: bytes) -> Any:
        """One request of git's smart HTTP protocol."""
        name = path[1:].partition(".git/")[0]
        if name in self.renamed:
            return 301, "", {"Location": f"{self.url}/{self.renamed[name]}.git/info/refs?{query}"}
        scheme, _, coded = headers.get("Authorization", "").partition(" ")
        user, _, token = base64.b64decode(coded).decode().partition(":")
        if scheme != "Basic" or user != "x-access-token" or token not in self.tokens:
            return 401, "Invalid username or token.", {"WWW-Authenticate": 'Basic realm="GitHub"'}
        self.check_token(token, name)
        env = {"PATH": os.environ["PATH"], "GIT_PROJECT_ROOT": str(self.top), **GIT}
        env |= {"GIT_HTTP_EXPORT_ALL": "1", "REMOTE_USER": user, "REMOTE_ADDR": "127.0.0.1"}
        env |= {"REQUEST_METHOD": method, "PATH_INFO": path, "QUERY_STRING": query}
        env |= {"CONTENT_TYPE": headers.get("Content-Type", "")}
        env |= {"HTTP_CONTENT_ENCODING": headers.get("Content-Encoding", "")}
        env |= {"GIT_PROTOCOL": headers.get("Git-Protocol", "")}
        done = subprocess.run([BACKEND], env=env, input=body, capture_output=True, check=True)
        head, _, data = done.stdout.partition(b"\r\n\r\n")
        given = dict(line.split(": ", 1) for line in head.decode().split("\r\n"))
        self.sent += len(data)
        return int(given.pop("Status", "200").split()[0]), data, given


class Answerer(http.server.BaseHTTPRequestHandler):
    """One connection to the Hub."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, _, query = self.path.partition("?")
        call = f"{self.command} {self.path}"
        self.server.calls.append(call)
        after, answer = None, None
        for fault in list(self.server.faults):
            pattern, when, what = fault
            if re.match(pattern, call):
                self.server.faults.remove(fault)
                if when == "after":
                    after = what
                elif isinstance(what, tuple):
                    answer = what
                else:
                    what()
                break
        try:
            answer = answer or self.ask(path, query, body)
        except Refused as error:
            status, message = error.args
            answer = status, {"message": message}
        if after is not None:
            after()
            self.close_connection = True  # the answer is lost
            return
        status, value, *more = answer
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {**dict(*more), "Content-Length": len(data)}.items():
            self.send_header(name, str(text))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(data)

    do_POST = do_PATCH = do_GET

    def ask(self, path: str, query: str, body: bytes) -> Any:
        if ".git/" in path:
            return self.server.git(self.command, path, query, self.headers, body)
        token = self.headers.get("Authorization", "").partition("Bearer ")[2]
        given = json.loads(body or "{}")
        status, value, *more = self.server.rest(self.command, path, query, token, given)
        etag = f'"{hash(json.dumps(value))}"'
        if self.headers.get("If-None-Match") == etag:
            self.server.unchanged += 1
            return 304, b""
        return status, value, {**dict(*more), "ETag": etag}

    def date_time_string(self, timestamp: float | None = None) -> str:
        return email.utils.formatdate((timestamp or time.time()) + self.server.skew, usegmt=True)


CLAUDE = r"""#!/bin/sh
[ "$1" = --version ] && exec echo "2.1.0 (Claude Code, a stand-in)"
seen='@TOP@/seen'; top='@TOP@'
[ -w "$seen" ] || seen=$HOME
here=$(mktemp -d "$seen/run.XXXXXX")
printf '%s\n' "$@" >"$here/argv"; env >"$here/env"; cat >"$here/stdin"
say() { printf '{"type":"assistant","message":{"content":[{"type":"text","text":"%s"}]}}\n' "$1"; }
result() {
    printf '{"type":"result","subtype":"%s","is_error":%s,"num_turns":%s,"result":"%s",' \
        "${2:-success}" "${3:-false}" "${4:-3}" "${1:-Done.}"
    printf '%s"total_cost_usd":0.25,"session_id":"x"}\n' "$more"
}
more= asked=; read -r asked <"$here/stdin"
kind() {
    [ "$asked" = Comment: ] || return 0
    more="\"structured_output\":{\"kind\":\"$1\",\"ask\":\"$2\"},"; result; exit
}
answer() {
    pattern='s/^<comment-[^ ]* id="\([0-9]*\)".*/,{"comment_id":\1,"body":"'$1' \1."}/p'
    each=$(sed -n "$pattern" "$here/stdin" | tr -d '\n')
    more="\"structured_output\":{\"answers\":[${each#,}],\"summary\":\"$1.\"},"; result "$1"
}
block() { : >"$top/reached"; while [ ! -e "$top/go" ]; do sleep 0.02; done; }
"""
HELLO = "echo hello >hello.txt; result 'Wrote hello.txt.'"


class Answer(NamedTuple):
    status: int
    headers: Any
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)


class Stand:
    """Repositories, a GitHub, an agent and codebot's server in one temporary directory.

    The server starts with the first request, if it was not started with settings before.
    """

    def __init__(self, top: Path, kit: Path) -> None:
        self.top, self.kit, self.work, self.here = top, kit, top / "work", top / "here"
        for name in ("here", "home", "seen", "hub", "tmp"):
            (top / name).mkdir()
        shutil.copytree(kit / "keys", top / "keys")
        self.key = top / "keys" / "app.pem"
        self.hub = Hub(top / "hub", top / "keys" / "app.pub")
        self.server: subprocess.Popen[bytes] | None = None
        self.log_file, self.port, self.codes = top / "log", 0, (0,)
        self.name, self.others = NAME, itertools.count(1)
        self.first, self.heard = 1, 0  # our first pull request, and the length of the log before
        self.repository()
        self.agent(HELLO)

    def renew(self) -> None:
        """As good as new, for the next test with the same server: a repository of its own, and
        nothing asked of the agent and of GitHub yet."""
        self.first, self.heard = len(self.hub.pulls) + 1, self.heard + len(self.log())
        self.name = f"{NAME}-{next(self.others)}"
        self.repository(self.name)
        self.agent(HELLO)
        self.hub.forget()
        for run in (self.top / "seen").iterdir():
            shutil.rmtree(run)
        self.fresh()

    def fresh(self) -> None:
        """Let the agent block again."""
        for name in ("go", "reached"):
            (self.top / name).unlink(missing_ok=True)

    def go(self) -> None:
        (self.top / "go").touch()

    @property
    def pulls(self) -> list[dict[str, Any]]:
        """The pull requests that codebot opened here."""
        return self.hub.pulls[self.first - 1 :]

    # -- what codebot works with

    def repository(self, name: str = NAME, **files: str) -> None:
        shutil.copytree(self.kit / "bare", self.top / "hub" / f"{name}.git")
        shutil.copytree(self.kit / "seed", self.top / "seed" / name)
        if files:
            self.commit(name, **files)

    def commit(self, name: str = "", branch: str = "main", **files: str) -> str:
        name = name or self.name
        seed = self.top / "seed" / name
        sh("git", "checkout", "-q", "-B", branch, cwd=seed)
        for path, text in files.items():
            (seed / path).write_text(text)
        sh("git", "add", "-A", cwd=seed)
        sh("git", "commit", "-q", "-m", f"Change {', '.join(files)}", cwd=seed)
        sh("git", "push", "-q", str(self.top / "hub" / f"{name}.git"), branch, cwd=seed)
        return sh("git", "rev-parse", "HEAD", cwd=seed)

    def git(self, *args: str, name: str = "") -> str:
        return sh("git", "-C", str(self.top / "hub" / f"{name or self.name}.git"), *args)

    def branches(self, name: str = "") -> list[str]:
        return self.git("for-each-ref", "--format=%(refname:short)", name=name).split()

    def url(self, name: str = "") -> str:
        return f"{self.hub.url}/{name or self.name}"

    def agent(self, plan: str) -> None:
        """The agent does PLAN, in sh; say, result and block are there for it, and for reviews
        kind, which ends the run that sorts what was said, and answer, for each thread."""
        script = self.top / "claude"
        fresh = self.top / "claude.new"
        fresh.write_text(CLAUDE.replace("@TOP@", str(self.top)) + plan + "\n")
        fresh.chmod(0o755)
        fresh.rename(script)

    def seen(self, what: str) -> list[str]:
        """What the agent was given, run by run: its argv, env or stdin."""
        runs = sorted((self.top / "seen").glob("run.*"), key=lambda p: p.stat().st_mtime_ns)
        return [(run / what).read_text() for run in runs]

    def asked(self, what: str) -> list[tuple[list[str], str]]:
        """The agent's runs that were asked for a Task, to sort a Comment, a Question and so on:
        their arguments and their stdin."""
        runs = zip(self.seen("argv"), self.seen("stdin"))
        return [(argv.split("\n"), told) for argv, told in runs if told.startswith(f"{what}:\n")]

    def secrets(self) -> list[str]:
        plain = [KEY, HOOK_SECRET, *self.hub.tokens, *self.hub.jwts]
        plain += self.key.read_text().splitlines()[1:-1]
        coded = [f"x-access-token:{token}" for token in self.hub.tokens]
        return plain + [base64.b64encode(text.encode()).decode() for text in plain + coded]

    # -- codebot's process

    def environment(self, **more: str | None) -> dict[str, str]:
        given = {k: v for k, v in os.environ.items() if k.startswith("COVERAGE_")}
        given |= {"PATH": os.environ["PATH"], "HOME": str(self.top / "home"), "LC_ALL": "C.UTF-8"}
        given |= {"TMPDIR": str(self.top / "tmp"), "CODEBOT_SANDBOX": "none"}
        given |= {"CODEBOT_API_KEYS": KEY, "ANTHROPIC_API_KEY": MODEL_KEY}
        given |= {"CODEBOT_CLAUDE_COMMAND": str(self.top / "claude")}
        given |= {"GITHUB_APP_ID": "12345", "GITHUB_APP_INSTALLATION_ID": "678"}
        given |= {"GITHUB_APP_PRIVATE_KEY_PATH": str(self.key), "GITHUB_API_URL": self.hub.url}
        given |= {"GITHUB_WEBHOOK_SECRET": HOOK_SECRET}
        return {name: text for name, text in {**given, **more}.items() if text is not None}

    def words(self, limits: dict[str, Any]) -> list[str]:
        """The words that start codebot, with some of its limits made smaller.  Imported, since
        Python keeps that compiled: there are some 200 starts."""
        assert all(hasattr(codebot, name) for name in limits)
        code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import codebot\n"
        code += "".join(f"codebot.{name} = {value!r}\n" for name, value in limits.items())
        return [sys.executable, "-c", f"{code}sys.exit(codebot.main())"]

    def start(self, *args: str, limits: dict[str, Any] = {}, **env: str | None) -> None:  # noqa: B006
        words = [sys.executable, str(PROGRAM)] if "--debug" in args else self.words(limits)
        argv = [*words, "serve", "--port", "0", "--work-dir", str(self.work), *args]
        size = len(self.log())
        how: dict[str, Any] = {"cwd": self.here, "env": self.environment(**env)}
        with open(self.log_file, "ab") as out:
            self.server = subprocess.Popen(argv, stdout=out, stderr=out, **how)
        self.ready(size)

    def address(self) -> tuple[str, int]:
        if self.server is None:
            self.start()
        return "127.0.0.1", self.port

    def ready(self, size: int = 0) -> None:
        def found() -> Any:
            assert self.server is not None
            assert self.server.poll() is None, self.log()
            return re.search(r"port (\d+)\.\.\.(.|\n)*Taken up again.*\n", self.log()[size:])

        self.port = int(wait_for(found)[1])

    def log(self) -> str:
        return self.log_file.read_text()[self.heard :] if self.log_file.exists() else ""

    def signal(self, number: int) -> None:
        assert self.server is not None
        self.server.send_signal(number)

    def gone(self) -> int:
        """The server's exit code."""
        assert self.server is not None
        code = self.server.wait(15)
        self.server = None
        return code

    def end(self, number: int) -> int:
        self.signal(number)
        return self.gone()

    def kill(self) -> None:
        self.end(signal.SIGKILL)

    def stop(self) -> None:
        assert self.end(signal.SIGTERM) in self.codes, self.log()
        wait_for(lambda: not self.strays())

    def close(self) -> None:
        self.go()
        if self.server is not None and self.server.poll() is None:
            assert self.end(signal.SIGTERM) in self.codes, self.log()
        self.hub.close()
        wait_for(lambda: not self.strays())

    def strays(self) -> list[str]:
        """Processes that have to do with this stand."""
        found, mine = [], str(self.top).encode()
        for process in Path("/proc").glob("[0-9]*"):
            told = b""
            for name in ("cmdline", "environ") if process.name != str(os.getpid()) else ():
                with contextlib.suppress(OSError):
                    told += (process / name).read_bytes() + os.fsencode(
                        os.readlink(process / "cwd")
                    )
            if mine in told:
                found.append(f"{process.name} {told!r}")
        return found

    def only_the_server_is_left(self) -> bool:
        return len(self.strays()) <= 2  # its watch is a process of its own

    def run(self, *args: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        """One of codebot's commands, to its end."""
        how: dict[str, Any] = {"cwd": self.here, "env": self.environment(**env), "timeout": 60}
        argv = [*self.words({}), *args]
        how |= {"input": stdin, "capture_output": True, "text": True}
        return subprocess.run(argv, check=False, **how)

    # -- its API

    def ask(self, method: str, path: str, body: Any = None, key: str = KEY, **more: str) -> Answer:
        """One request; a header's name may have _ for -."""
        headers = {name.replace("_", "-"): text for name, text in more.items()}
        headers |= {"Authorization": f"Bearer {key}"} if key else {}
        data = body if body is None or isinstance(body, (bytes, str)) else json.dumps(body)
        web = http.client.HTTPConnection(*self.address(), timeout=30)
        with contextlib.closing(web):
            web.request(method, path, data, headers)
            got = web.getresponse()
            return Answer(got.status, got.headers, got.read().decode())

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address(), timeout=30)

    def raw(self, data: bytes) -> bytes:
        """All that comes back for these bytes until the server hangs up."""
        with self.connect() as sock:
            sock.sendall(data)
            return b"".join(iter(lambda: sock.recv(65536), b""))

    def slow_reader(self, head: str) -> socket.socket:
        """A connection that has sent HEAD, and whose kernel takes little of the answer."""
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(30)
        sock.connect(self.address())
        sock.sendall(head.encode())
        return sock

    def task(self, description: str = "Say hello", **fields: Any) -> dict[str, Any]:
        return {"repository_url": self.url(), "description": description, **fields}

    def post(self, body: Any = None, **headers: str) -> Answer:
        body = self.task() if body is None else body
        return self.ask("POST", "/api/tasks/submit", body, **headers)

    def cancel(self, task_id: str) -> int:
        return self.ask("POST", f"/api/tasks/{task_id}/cancel", "").status

    def submit(self, description: str = "Say hello", **fields: Any) -> str:
        answer = self.post(self.task(description, **fields))
        assert answer.status == 202, answer.text
        task_id: str = answer.json["task_id"]
        return task_id

    def plans(self, plans: dict[str, str]) -> None:
        """The agent does the plan of the words that its prompt has."""
        each = [*((f"*'{words}'*", plan) for words, plan in plans.items()), ("*", HELLO)]
        cases = "".join(f"{words})\n{plan}\n;;\n" for words, plan in each)
        self.agent(f'case $(cat "$here/stdin") in\n{cases}esac')

    def submit_each(self, plans: Iterable[str], **fields: Any) -> list[str]:
        """Tasks whose agents do these plans, all at once."""
        named = {f"Number {n}.": plan for n, plan in enumerate(plans)}
        self.plans(named)
        return [self.submit(words, **fields) for words in named]

    def status(self, task_id: str) -> dict[str, Any]:
        answer = self.ask("GET", f"/api/tasks/{task_id}/status")
        assert answer.status == 200, answer.text
        status: dict[str, Any] = answer.json
        return status

    def ended(self, task_id: str) -> dict[str, Any]:
        end, over = re.compile(rf"task {task_id}: \w+ -> [cf]"), ("completed", "failed")
        wait_for(lambda: end.search(self.log()))  # which costs the server less than to be asked
        status: dict[str, Any] = wait_for(
            lambda: (s := self.status(task_id))["status"] in over and s
        )
        return status

    def done(self, task_id: str) -> dict[str, Any]:
        status = self.ended(task_id)
        assert status["status"] == "completed", status
        result: dict[str, Any] = status["result"]
        return result

    def failed(self, task_id: str, reason: str) -> str:
        """The sentence that a failed task leaves."""
        status = self.ended(task_id)
        assert status.get("reason") == reason, status
        return str(status["error"])

    def folders(self) -> set[str]:
        """Those of tasks in the work-dir, whatever their names."""
        return {path.name for path in self.work.iterdir() if path.is_dir()} - {"mirrors"}

    @contextlib.contextmanager
    def database(self) -> Iterator[sqlite3.Connection]:
        with contextlib.closing(sqlite3.connect(self.work / "codebot.db")) as db, db:
            yield db

    def age(self, task_id: str) -> None:
        """Let a task have ended long ago, and its pull request if that is closed."""
        past = "= '2026-01-01' WHERE"
        with self.database() as db:
            db.execute(f"UPDATE tasks SET completed_at {past} id = ?", (task_id,))
            db.execute(f"UPDATE pulls SET closed_at {past} task_id = ? AND closed_at", (task_id,))

    def forgotten(self, task_id: str) -> None:
        """Wait until the keeper has removed a task, which ended long ago."""
        self.age(task_id)
        wait_for(lambda: self.ask("GET", f"/api/tasks/{task_id}/status").status == 404)

    def events(self, task_id: str) -> list[str]:
        events = self.ask("GET", f"/api/tasks/{task_id}/logs").json["events"]
        return [f"{event['source']}: {event['message']}" for event in events]

    def stream(self, task_id: str, **headers: str) -> http.client.HTTPResponse:
        web = http.client.HTTPConnection(*self.address(), timeout=30)
        headers |= {"Authorization": f"Bearer {KEY}", "Accept": "text/event-stream"}
        web.request("GET", f"/api/tasks/{task_id}/logs", headers=headers)
        return web.getresponse()

    # -- people on GitHub, and what GitHub tells of them

    def deliver(self, event: str, body: Any, guid: str = "", **headers: str) -> Answer:
        """One webhook, signed."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        signature = hmac.new(HOOK_SECRET.encode(), data, hashlib.sha256).hexdigest()
        headers = {"X_Hub_Signature_256": f"sha256={signature}", **headers}
        headers |= {"X_GitHub_Event": event, "X_GitHub_Delivery": guid or str(uuid.uuid4())}
        headers = {"Content_Type": "application/json", **headers}
        return self.ask("POST", "/webhook", data, "", **headers)

    def event(self, action: str, on: int = 0, **more: Any) -> dict[str, Any]:
        repository = {"id": 1, "full_name": self.hub.renamed.get(self.name, self.name)}
        number = {"number": on or self.first}
        return {"action": action, "repository": repository, "pull_request": number, **more}

    def tell(self, said: dict[str, Any], action: str = "", guid: str = "") -> Answer:
        """The webhook about what was said."""
        kind, body = said["kind"], {**said, "body": said["body"] or None}
        action = action or ("submitted" if kind == "review" else "created")
        body |= {"state": str(said.get("state")).lower()}  # which REST has in upper case
        value = self.event(
            action, said["on"], **{"review" if kind == "review" else "comment": body}
        )
        if kind == "issue":
            value["issue"] = {**value.pop("pull_request"), "pull_request": {}}
        return self.deliver(EVENTS[kind], value, guid)

    def comment(self, user: Any, text: str, on: int = 0, tell: bool = True) -> dict[str, Any]:
        """Someone speaks in the conversation."""
        said = self.hub.say("issue", on or self.first, user, text)
        if tell:
            assert self.tell(said).status == 202
        return said

    def review(
        self, user: str, text: str, *inline: str, on: int = 0, tell: bool = True, **more: Any
    ) -> list[dict[str, Any]]:
        """Someone's review, and its comments on a line of the diff."""
        on = on or self.first
        review = self.hub.say("review", on, user, text, state="COMMENTED")
        more |= {"pull_request_review_id": review["id"], "path": "hello.txt", "line": None}
        more |= {"original_line": 1, "diff_hunk": "@@ -0,0 +1 @@\n+hello"}
        said = [review, *(self.hub.say("inline", on, user, words, **more) for words in inline)]
        for one in reversed(said if tell else []):
            self.tell(one)
        return said

    def inline(self, user: str, text: str, to: int = 0, **how: Any) -> dict[str, Any]:
        """Someone speaks on a line, or in its thread: with a review that says nothing itself."""
        how |= {"in_reply_to_id": to} if to else {}
        return self.review(user, "", text, **how)[1]

    def answers(self) -> list[str]:
        """What codebot said on the first pull request."""
        return [s["body"] for s in self.hub.said if s["user"] == BOT and s["on"] == self.first]

    def rounds(self, task_id: str, count: int) -> list[dict[str, Any]]:
        """The rounds of reviews of a task's pull request, once so many are over."""

        def over() -> Any:
            found = self.status(task_id)["reviews"]
            states = {one["state"] for one in found} - {"completed", "failed"}
            return len(found) >= count and not states and found

        found: list[dict[str, Any]] = wait_for(over)
        assert len(found) == count, found
        return found

    def logged(self, text: str, times: int = 1) -> None:
        wait_for(lambda: self.log().count(text) >= times)

    def reached(self) -> bool:
        return (self.top / "reached").exists()

    def shown(self, result: dict[str, Any], path: str, name: str = "") -> str:
        return self.git("show", f"{result['branch_name']}:{path}", name=name)


@pytest.fixture(scope="session")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each stand has a copy of, made once: a key, a certificate, a repository."""
    kit = tmp_path_factory.mktemp("kit")
    (kit / "keys").mkdir()
    how: dict[str, Any] = {"cwd": kit / "keys"}
    sh("openssl", "genrsa", "-out", "app.pem", "2048", **how)
    sh("openssl", "rsa", "-in", "app.pem", "-pubout", "-out", "app.pub", **how)
    argv = ("openssl", "req", "-x509", "-new", "-key", "app.pem", "-out", "cert.pem", "-subj")
    sh(*argv, "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", **how)
    (kit / "keys" / "app.pem").chmod(0o600)
    for words in (("--bare", "bare"), ("seed",)):
        sh("git", "init", "-q", "--template=", "-b", "main", *words, cwd=kit)
    sh("git", "config", "receive.autogc", "false", cwd=kit / "bare")
    (kit / "seed" / "README.md").write_text("widget\n")
    for line in ("add -A", "commit -qm Begin", "push -q ../bare main"):
        sh("git", *line.split(), cwd=kit / "seed")
    return kit


@pytest.fixture
def stand(tmp_path: Path, kit: Path) -> Any:
    stand = Stand(tmp_path, kit)
    try:
        yield stand
    finally:
        stand.close()


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory, kit: Path) -> Any:
    stand = Stand(tmp_path_factory.mktemp("common"), kit)
    try:
        env = {"CODEBOT_REVIEW_WORKERS": "2", "CODEBOT_TEST_ATTEMPTS": "1"}
        env["CODEBOT_API_KEYS"] = f"other-key, {KEY}"  # these, as some tests want them
        limits = {"LINGER": 0.3, "RESULT_GRACE": 0.3, "PUSHES": 2}
        stand.start("--workers", "8", limits=limits, **env)
        yield stand
    finally:
        stand.close()


@pytest.fixture
def shared(common: Stand) -> Any:
    """A stand whose server other tests use too: to start one takes longer than most tests."""
    common.renew()
    yield common
    common.go()
    wait_for(common.only_the_server_is_left)


# ---- A task, from the request to the pull request ---------------------------------


def test_a_task_becomes_a_pull_request(shared: Stand) -> None:
    task = shared.submit("Say hello\n\nPlease.", ticket_id="AB-7", ticket_summary="Greet people")
    result = shared.done(task)
    assert re.fullmatch(r"u/codebot/AB-7/[0-9a-f]{7}/greet-people", result["branch_name"])
    assert shared.shown(result, "hello.txt") == "hello"
    [pull] = shared.pulls
    assert (pull["title"], pull["base"]["ref"]) == ("AB-7: Greet people", "main")
    assert pull["head"]["ref"] == result["branch_name"]
    for part in ("Wrote hello.txt.", "> Please.", "hello.txt | 1 +", "No test", f"task {task}"):
        assert part in pull["body"]
    assert result["pr_url"] == pull["html_url"]
    assert (result["pr_number"], result["pr_state"]) == (pull["number"], "open")
    assert result["commit"] == shared.git("rev-parse", result["branch_name"])
    assert (result["cost_usd"], result["num_turns"], result["session_id"]) == (0.25, 3, task)
    assert (result["summary"], result["tests"]) == ("Wrote hello.txt.", None)
    assert Path(result["work_dir"], "hello.txt").exists()
    assert re.fullmatch(
        "task_AB-7_[0-9a-f]{7}/repo", os.path.relpath(result["work_dir"], shared.work)
    )


def test_the_commit_carries_the_apps_name_and_nobody_elses(shared: Stand) -> None:
    branch = shared.done(shared.submit())["branch_name"]
    said = shared.git("log", "-1", "--format=%an|%ae|%cn|%ce|%B", branch)
    who = "acme-bot[bot]|77+acme-bot[bot]@users.noreply.127.0.0.1|"
    assert said == f"{who * 2}Say hello"
    assert json.loads(shared.seen("argv")[0].split("--settings\n")[1].split("\n")[0]) == {
        "includeCoAuthoredBy": False
    }


def test_the_agents_own_commits_are_pushed_with_what_it_left(shared: Stand) -> None:
    shared.agent("echo 1 >one; git add one; git commit -qm 'Add one'; echo 2 >two; result")
    result = shared.done(shared.submit())
    log = shared.git("log", "--format=%s", f"main..{result['branch_name']}")
    assert log.split("\n") == ["Say hello", "Add one"]


def test_the_prompt_goes_by_stdin_and_the_limits_by_flags(stand: Stand) -> None:
    env: dict[str, Any] = {"CODEBOT_MAX_TURNS": "9", "CODEBOT_MAX_BUDGET_USD": "2.5"}
    stand.start(CODEBOT_CLAUDE_ARGS="--model 'my model'", **env)
    task = stand.submit("--help; say $(hello) …", ticket_summary="-x")
    stand.done(task)
    argv = stand.seen("argv")[0].split("\n")
    assert "--help; say $(hello) …" in stand.seen("stdin")[0]
    assert not any("hello" in word for word in argv)
    for pair in (("--session-id", task), ("--max-turns", "9"), ("--model", "my model")):
        assert argv[argv.index(pair[0]) + 1] == pair[1]
    assert float(argv[argv.index("--max-budget-usd") + 1]) == 2.5
    assert argv[argv.index("--setting-sources") + 1] == ""
    assert "--strict-mcp-config" in argv


def test_no_secret_reaches_agent_test_log_events_pull_request_or_file(stand: Stand) -> None:
    stand.agent(f"say 'my key is {MODEL_KEY}'; echo hello >hello.txt; result 'I have {MODEL_KEY}'")
    stand.start("--debug", HTTPS_PROXY_NOT="x", CODEBOT_AGENT_ENV="EXTRA", EXTRA="e", OTHER="o")
    task = stand.submit(test_command=f"env >{stand.top}/test-env; echo the-key'-of-a-client'")
    result = stand.done(task)
    [env] = stand.seen("env")
    tested = (stand.top / "test-env").read_text()
    public = "\n".join([stand.log(), *stand.events(task), json.dumps(result), str(stand.pulls)])
    for secret in stand.secrets():
        assert secret not in env + tested + stand.seen("argv")[0] + public
    assert MODEL_KEY not in tested + public
    assert "agent: my key is ***" in public
    assert "test: ***" in public
    assert f"ANTHROPIC_API_KEY={MODEL_KEY}\n" in env
    assert "EXTRA=e\n" in env
    assert "EXTRA=" not in tested
    assert "OTHER=" not in env
    assert not re.search("^(CODEBOT_API|GITHUB_)", env, re.MULTILINE)
    stand.stop()
    files = [path.read_bytes() for path in stand.work.rglob("*") if path.is_file()]
    assert files
    for secret in stand.secrets():
        assert not [True for data in files if secret.encode() in data]


def test_no_secret_is_on_a_command_line(shared: Stand) -> None:
    holds = [shared.hub.hold(call) for call in ("GET .*/info/refs", "POST .*/git-receive-pack")]
    task = shared.submit()
    for hold in holds:
        assert hold.reached.wait(20)
        lines = sh("ps", "-e", "-ww", "-o", "args")
        assert f"{shared.url()}.git" in lines
        assert not [secret for secret in shared.secrets() if secret in lines]
        hold.go.set()
    shared.done(task)


def test_without_github_a_branch_is_pushed_and_nothing_else_asked(stand: Stand) -> None:
    stand.start("--no-github", GITHUB_APP_ID="", GITHUB_APP_PRIVATE_KEY_PATH="")
    remote = str(stand.top / "hub" / f"{NAME}.git")
    result = stand.done(stand.submit(repository_url=remote))
    assert stand.shown(result, "hello.txt") == "hello"
    assert (result["pr_url"], stand.hub.calls) == (None, [])
    missing = stand.submit(repository_url=str(stand.top / "nothing.git"))
    assert "Failed to clone repository" in stand.failed(missing, "clone_failed")


def test_the_base_branch_is_used_for_the_work_and_the_pull_request(shared: Stand) -> None:
    shared.commit(branch="release/1", only="here\n")
    result = shared.done(shared.submit(base_branch="release/1"))
    assert shared.shown(result, "only") == "here"
    assert shared.pulls[0]["base"]["ref"] == "release/1"


def test_a_base_that_is_no_branch_is_not_found(shared: Stand) -> None:
    sha = shared.git("rev-parse", "main")
    shared.git("tag", "v1", "main")
    shared.git("update-ref", "refs/pull/1/head", "main")
    bare = shared.top / "hub" / "acme" / "empty.git"
    sh("git", "init", "-q", "--bare", str(bare))
    bases = ("v1", sha, "nothing", "refs/heads/main", "tags/v1", "pull/1/head")
    tasks = [shared.submit(base_branch=base) for base in bases]
    empty = shared.submit(repository_url=shared.url("acme/empty"))
    for base, task in zip(bases, tasks):
        assert repr(base) in shared.failed(task, "base_branch_not_found")
    shared.failed(empty, "base_branch_not_found")
    assert shared.seen("argv") == []


def test_a_second_task_fetches_only_what_is_new(shared: Stand) -> None:
    noise = base64.b64encode(os.urandom(300_000)).decode()
    shared.commit(noise=noise)
    shared.done(shared.submit())
    first, shared.hub.sent = shared.hub.sent, 0
    shared.commit(small="news\n")
    result = shared.done(shared.submit("And again"))
    assert shared.shown(result, "small") == "news"
    assert first > 200_000
    assert shared.hub.sent < 20_000
    assert len(list((shared.work / "mirrors").rglob(f"{Path(shared.name).name}.git"))) == 1


def test_many_tasks_at_once_all_become_pull_requests(shared: Stand) -> None:
    tasks = [shared.submit(f"Task {n}") for n in range(12)]
    branches = {shared.done(task)["branch_name"] for task in tasks}
    assert len(branches) == len(shared.pulls) == 12
    assert branches <= set(shared.branches())


TICKETS = [
    ("../../etc", "..", r"etc/[0-9a-f]{7}/task"),
    ("Ünï cødé/1", "Fix: the *best* ~bug^?", r"Uni-cde-1/[0-9a-f]{7}/fix-the-best-bug"),
    ("-x.lock", "a" * 400, r"x-lock/[0-9a-f]{7}/a{40}"),
]


def test_ticket_and_summary_are_made_safe(shared: Stand) -> None:
    tasks = [shared.submit(ticket_id=ticket, ticket_summary=text) for ticket, text, _ in TICKETS]
    for task, (_, _, pattern) in zip(tasks, TICKETS):
        result = shared.done(task)
        assert re.fullmatch(f"u/codebot/{pattern}", result["branch_name"])
        assert Path(result["work_dir"]).parent.parent == shared.work
    assert all(len(pull["title"]) <= 250 for pull in shared.pulls)


def test_a_description_of_the_greatest_length_just_works(shared: Stand) -> None:
    shared.done(shared.submit("é " * 50_000))
    assert shared.seen("stdin")[0].count("é") == 50_000
    assert len(shared.pulls[0]["body"]) < 65_000


# ---- What the agent may do wrong --------------------------------------------------

SESSION_OVER = "Not logged in · Please run /login"
RETRY = '{"type":"system","subtype":"api_retry","error_status":401,"error":"authentication_failed"}'


WRONG = [
    ("echo oops >&2; exit 3", "agent_failed", "without a result, code 3: oops"),
    ("result 'It broke' success true", "agent_failed", "It broke"),
    ("result 'It broke' error_during_execution true", "agent_failed", "It broke"),
    ("result 'Nothing done' success false 0", "agent_failed", "Nothing done"),
    (f"result '{SESSION_OVER}' success true", "agent_login", "/login"),
    (f"echo '{RETRY}'; sleep 100", "agent_login", "login failed"),
    ("result 'Too dear' error_max_budget_usd true", "budget", "Too dear"),
    ("result 'Too long' error_max_turns true", "budget", "Too long"),
    ("result 'Nothing to do here'", "no_changes", "Nothing to do here"),
    ("rm -rf .git; echo x >x; result", "agent_failed", "git"),
    ("git init -q s; git -C s commit -q --allow-empty -m s; result", "agent_failed", "s is a"),
    ('echo \'{"type":"result","is_error":true,"errors":{"a":1}}\'', "agent_failed", "a"),
    ("git checkout -q --orphan o; git commit -qm o; result", "agent_failed", "base commit"),
    ("echo x >.git/HEAD; echo x >x; result", "agent_failed", "commit what was left"),
    ("mkdir sub; git -C sub init -q; result", "agent_failed", "sub"),
]


def test_an_agent_that_goes_wrong_fails_its_task(shared: Stand) -> None:
    before = {*shared.work.glob("task_*/repo")}
    for task, (plan, reason, words) in zip(shared.submit_each(p for p, *_ in WRONG), WRONG):
        assert words in shared.failed(task, reason), plan
    assert (shared.pulls, shared.branches()) == ([], ["main"])
    assert len({*shared.work.glob("task_*/repo")} - before) == len(WRONG)


def test_an_agent_that_is_not_there_fails_its_task(stand: Stand) -> None:
    stand.start(CODEBOT_CLAUDE_COMMAND="/nonexistent/claude")
    assert "Cannot start the agent" in stand.failed(stand.submit(), "agent_failed")


def test_agents_and_tests_that_hang_are_ended(stand: Stand) -> None:
    limits = {"CODEBOT_TASK_TIMEOUT": "2", "CODEBOT_STALL_TIMEOUT": "1"}
    stand.start("--workers", "3", limits={"KILL_GRACE": 0.2}, **limits)
    hang = "trap '' TERM; setsid sleep 300 & while :; do {}; done"
    plans = [hang.format("sleep 300"), hang.format("say hm; sleep 0.1"), HELLO]
    silent, talking, testing = stand.submit_each(plans, test_command=hang.format("sleep 300"))
    assert "CODEBOT_STALL_TIMEOUT" in stand.failed(silent, "stalled")
    assert "CODEBOT_TASK_TIMEOUT" in stand.failed(talking, "timeout")
    stand.failed(testing, "stalled")
    assert not [stray for stray in stand.strays() if "sleep" in stray]


GOOD = [
    f"{HELLO}; exit 9",
    f"{HELLO}; sleep 300",
    f"setsid sleep 300 & {HELLO}",
    f"{HELLO}; trap '' TERM; while :; do sleep 300; done",
    f"echo 'no json'; echo '[]'; echo '{{\"type\":3}}'; {HELLO}",
    f"head -c 9000000 /dev/zero | tr '\\0' x; echo; {HELLO}",
    f"seq 1 2000; {HELLO}",
]


def test_a_good_result_counts_whatever_else_the_agent_does(shared: Stand) -> None:
    for task, plan in zip(shared.submit_each(GOOD), GOOD):
        assert shared.shown(shared.done(task), "hello.txt") == "hello", plan
    assert not [stray for stray in shared.strays() if "sleep" in stray]


def test_events_are_for_people_and_what_is_long_is_cut(shared: Stand) -> None:
    use = '{"type":"tool_use","name":"Bash","input":{"command":"ls -l"}}'
    other = '{"type":"tool_use","name":"TaskList","input":{"a":1}}'
    broken = '{"type":"tool_result","is_error":true,"content":"no such file"}'
    lines = [f'{{"type":"assistant","message":{{"content":[{use},{other}]}}}}']
    lines.append(f'{{"type":"user","message":{{"content":[{broken}]}}}}')
    plan = f"say 'one\\ntwo'; say 'red \\u001b[31m\\u0007'; say {'x' * 5000}; "
    plan += "; ".join(f"echo '{x}'" for x in lines)
    shared.agent(f"{plan}; {HELLO}")
    task = shared.submit()
    result = shared.done(task)
    events = shared.events(task)
    for event in (
        "agent: one ⏎ two",
        "agent: red \ufffd",
        "tool: Bash: ls -l",
        'tool: TaskList: {"a": 1}',
    ):
        assert event in events
    assert "tool: failed: no such file" in events
    assert any(e.endswith("(3000 characters cut)") for e in events)
    assert any(e.startswith("git: Pushed ") and result["branch_name"] in e for e in events)
    phases = [e.split(": ")[2] for e in events if ": Phase: " in e]
    assert phases == ["clone", "agent", "commit", "push", "pull_request"]


def test_only_so_many_events_are_kept(stand: Stand) -> None:
    stand.agent(f"seq 1 300; {HELLO}")
    stand.start(limits={"EVENTS": 50})
    task = stand.submit()
    stand.done(task)
    events = stand.events(task)
    assert len([event for event in events if event.startswith("agent: ")]) == 49
    assert any("not kept" in event for event in events)
    # what codebot says is kept all the same, this a moment after the status
    wait_for(lambda: stand.events(task)[-1] == "codebot: Completed")


# ---- The test command -------------------------------------------------------------


def test_a_failing_test_is_shown_to_the_agent_in_the_same_session(shared: Stand) -> None:
    shared.agent('case "$*" in *--resume*) echo good >state;; *) echo bad >state;; esac; result')
    task = shared.submit(test_command="cat state; grep -q good state")
    result = shared.done(task)
    command = {"command": "cat state; grep -q good state", "passed": True, "attempts": 2}
    assert result["tests"] == command
    assert (result["cost_usd"], result["num_turns"]) == (0.5, 6)
    first, second = (argv.split("\n") for argv in shared.seen("argv"))
    assert first[first.index("--session-id") + 1] == second[second.index("--resume") + 1] == task
    assert "ended with code 1" in shared.seen("stdin")[1]
    assert "<output>\nbad\n" in shared.seen("stdin")[1]
    assert "```\ncat state; grep -q good state\n```\n\nPassed." in shared.pulls[0]["body"]
    assert "test: bad" in shared.events(task)


def test_tests_that_fail_to_the_end_fail_the_task(shared: Stand) -> None:
    task = shared.submit(test_command="echo it is broken; exit 7")
    assert "with code 7: it is broken" in shared.failed(task, "tests_failed")
    assert (len(shared.seen("argv")), shared.branches()) == (2, ["main"])


def test_a_budget_holds_for_all_attempts_together(stand: Stand) -> None:
    stand.start(CODEBOT_MAX_BUDGET_USD="0.25")
    assert "budget" in stand.failed(stand.submit(test_command="exit 1"), "budget")
    assert len(stand.seen("argv")) == 1


# ---- GitHub and the remote --------------------------------------------------------


def test_tokens_are_asked_for_one_repository_and_few_permissions(shared: Stand) -> None:
    shared.done(shared.submit())
    rights = {"contents": "write", "pull_requests": "write", "issues": "write"}
    names = [Path(shared.name).name]
    assert shared.hub.minted == [{"repositories": names, "permissions": rights}]
    assert {claims["exp"] - claims["iat"] for claims in shared.hub.jwts.values()} == {600}


def test_what_is_lost_on_the_way_is_asked_for_again_and_done_once(shared: Stand) -> None:
    shared.hub.fault("GET .*/info/refs", (503, b"busy", {}))
    shared.hub.fault("POST .*/git-receive-pack", lambda: None, when="after")
    shared.hub.fault("POST .*/pulls$", lambda: None, when="after")
    result = shared.done(task := shared.submit())
    assert any("ls-remote failed, trying again" in event for event in shared.events(task))
    assert shared.git("rev-parse", result["branch_name"]) == result["commit"]
    assert [pull["number"] for pull in shared.pulls] == [result["pr_number"]]
    assert shared.hub.count("POST .*/pulls$") == 1  # it is looked for before it is asked again


LATER: list[Any] = [
    (500, b"<html>", {}),
    (502, {"message": "Bad Gateway"}),
    (429, {"message": "slow down"}, {"Retry-After": "1"}),
    (403, {"message": "You have exceeded a secondary rate limit"}, {"Retry-After": "1"}),
    (403, {"message": "no more"}, {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "1"}),
    (401, {"message": "Bad credentials"}),
    (200, b"{not json", {}),
]
REFUSALS: list[Any] = [
    (422, {"message": "Validation Failed", "errors": [{"field": "base", "code": "invalid"}]}),
    (403, {"message": "Resource not accessible by integration"}),
    (404, b"<html>no", {}),
    (307, {}, {"Location": "http://localhost:1/elsewhere"}),
    (422, {"message": "Validation Failed", "errors": ["plainly no"]}),
]
LAST: list[Any] = [(429, {"message": "tomorrow"}, {"Retry-After": "90000"})]


def test_what_github_asks_to_try_again_is_tried_again(shared: Stand) -> None:
    moved: Any = (307, {}, {"Location": f"/repos/{shared.name}/pulls"})
    shared.hub.fault("POST .*/pulls$", moved, *LATER)
    for task in [shared.submit() for _ in (moved, *LATER)]:
        assert shared.done(task)["pr_url"]
    assert shared.hub.count("POST .*/pulls$") == 2 + 2 * len(LATER)


def test_what_github_refuses_is_told_and_not_tried_again(stand: Stand) -> None:
    stand.start("--workers", "3")
    told = []
    for answers in (REFUSALS, LAST):
        stand.hub.fault("POST .*/pulls$", *answers)
        for task in [stand.submit() for _ in answers]:
            error = stand.failed(task, "pull_request_failed")
            assert "was pushed, but not the pull request opened" in error
            told.append(error.split("opened: ")[1][:3])
    statuses = sorted(str(answer[0]) for answer in REFUSALS + LAST)
    assert (sorted(told), stand.hub.count("POST .*/pulls$")) == (statuses, len(statuses))
    assert len(stand.branches()) == len(statuses) + 1
    calls = stand.hub.count(".*/repos/acme/widget/pulls")
    assert "rate limit is reached" in stand.failed(stand.submit(), "pull_request_failed")
    assert stand.hub.count(".*/repos/acme/widget/pulls") == calls  # nothing is asked until then


def test_a_jwt_of_a_wrong_clock_is_refused_and_signed_anew_by_githubs(stand: Stand) -> None:
    stand.hub.skew = 5000
    stand.done(stand.submit())
    old, *new = (claims["iat"] for claims in stand.hub.jwts.values())
    assert old < time.time() < time.time() + 4000 < min(new)


def test_a_key_that_is_not_the_apps_fails_the_clone(stand: Stand) -> None:
    sh("openssl", "genrsa", "-out", str(stand.key), "2048")
    assert "could not be decoded" in stand.failed(stand.submit(), "clone_failed")
    stand.stop()
    stand.key.write_text("no key")
    done = stand.run("serve", "--port", "0", "--work-dir", str(stand.work))
    words = "GITHUB_APP_PRIVATE_KEY_PATH: openssl cannot sign"
    assert (done.returncode, words in done.stderr) == (2, True)


def test_a_token_that_git_is_refused_with_is_renewed_once(shared: Stand) -> None:
    refusal = (401, b"Invalid username or token.", {"WWW-Authenticate": 'Basic realm="GitHub"'})
    shared.hub.fault("GET .*/info/refs", refusal)
    shared.done(shared.submit())
    assert len(shared.hub.minted) == 2
    shared.hub.fault("GET .*/info/refs", refusal, refusal)
    assert "authentication failed" in shared.failed(shared.submit(), "clone_failed")


def test_a_repository_that_is_not_there_cannot_be_cloned(shared: Stand) -> None:
    task = shared.submit(repository_url=shared.url("acme/nothing"))
    error = shared.failed(task, "clone_failed")
    assert error.startswith("Failed to clone repository: 422 There is at least one repository")
    shared.hub.fault("GET .*/info/refs", (404, b"Repository not found.", {}))
    assert "not found" in shared.failed(shared.submit(), "clone_failed")


def test_a_push_that_the_remote_rejects_is_told_in_its_words(shared: Stand) -> None:
    hook = shared.top / "hub" / f"{shared.name}.git" / "hooks" / "pre-receive"
    hook.parent.mkdir()
    hook.write_text("#!/bin/sh\necho 'GH013: no pushes on a Friday' >&2; exit 1\n")
    hook.chmod(0o755)
    assert "GH013: no pushes on a Friday" in shared.failed(shared.submit(), "push_rejected")
    assert shared.pulls == []


def rename(stand: Stand) -> None:
    stand.hub.renamed[NAME] = "acme/gadget"
    (stand.top / "hub" / f"{NAME}.git").rename(stand.top / "hub" / "acme" / "gadget.git")


def test_a_renamed_repository_is_followed(stand: Stand) -> None:
    stand.done(stand.submit())
    rename(stand)
    result = stand.done(stand.submit("Again"))
    assert "/acme/gadget/pull/" in result["pr_url"]
    assert stand.shown(result, "hello.txt", "acme/gadget") == "hello"


def test_a_repository_renamed_to_one_that_is_not_allowed_is_refused(stand: Stand) -> None:
    stand.start(CODEBOT_ALLOWED_REPOSITORIES="acme/w*")
    rename(stand)
    assert "acme/gadget now, which is not allowed" in stand.failed(stand.submit(), "clone_failed")


def test_github_is_asked_by_its_own_name_on_enterprise_and_ghe_com() -> None:
    def base(**named: Any) -> str:
        return codebot.Config(**named).git_base

    assert base() == "https://github.com"
    assert base(enterprise_url="https://ghe.acme.com") == "https://ghe.acme.com"
    assert base(api_url="https://api.acme.ghe.com") == "https://acme.ghe.com"
    assert base(api_url="https://ghe.acme.com:8443/api/v3") == "https://ghe.acme.com:8443"
    config = codebot.Config(enterprise_url="https://ghe.acme.com")
    assert config.github_api == "https://ghe.acme.com/api/v3"
    assert (
        codebot.parse_url(config, "git@ghe.acme.com:a/b.git").url == "https://ghe.acme.com/a/b.git"
    )


def test_a_github_that_is_not_there_fails_the_clone_in_plain_words(stand: Stand) -> None:
    stand.start(GITHUB_API_URL="http://127.0.0.1:9", limits={"GITHUB_WAIT": 0.5})
    task = stand.submit(repository_url="http://127.0.0.1:9/acme/widget")
    assert "GitHub cannot be reached" in stand.failed(task, "clone_failed")


# ---- Stop, crash, cancel, retry ---------------------------------------------------

CALLS = {  # of GitHub, by which a task waits in a step
    "base": ("GET /acme/base.git/info/refs.*upload", "before"),
    "fetch": ("POST /acme/fetch.git/git-upload-pack", "after"),
    "push": ("POST /acme/push.git/git-receive-pack", "before"),
    "pushed": ("POST /acme/pushed.git/git-receive-pack", "after"),
    "pull": ("POST /repos/acme/pull/pulls", "before"),
    "pulled": ("POST /repos/acme/pulled/pulls", "after"),
    "cancelled": ("POST /repos/acme/cancelled/pulls", "before"),
}
WAIT = "touch {0}/reached-{1}; while [ ! -e {0}/go ]; do sleep 0.05; done"


def submit_blocked(stand: Stand, *steps: str) -> dict[str, str]:
    """A task for each of these steps, of a repository with its name, that waits there now."""
    waits = {step: WAIT.format(stand.top, step) for step in steps}
    plans = {"agent": f"{waits.get('agent')}; {HELLO}", "result": f"{HELLO}; {waits.get('result')}"}
    filtered = (
        f"git config filter.f.clean 'sh {stand.top}/filter'; echo '* filter=f' >.gitattributes"
    )
    plans["commit"] = f"{filtered}; {HELLO}"
    (stand.top / "filter").write_text(f"{waits.get('commit')}; exec cat")
    stand.plans({f"Stop at {step}.": plans.get(step, HELLO) for step in steps})
    tasks, reached = {}, []
    for step in steps:
        stand.repository(f"acme/{step}")
        there = (stand.top / f"reached-{step}").exists
        reached.append(stand.hub.hold(*CALLS[step]).reached.is_set if step in CALLS else there)
        fields = {"test_command": waits[step]} if step == "test" else {}
        fields["repository_url"] = stand.url(f"acme/{step}")
        tasks[step] = stand.submit(f"Stop at {step}.", **fields)
    wait_for(lambda: all(look() for look in reached))
    return tasks


def test_killed_at_any_step_a_task_has_one_pull_request_in_the_end(stand: Stand) -> None:
    steps = [*CALLS, "agent", "result", "test", "commit"]
    stand.start("--workers", str(len(steps)), limits={"RESULT_GRACE": 30})
    tasks = submit_blocked(stand, *steps)
    tasks["widget"] = stand.submit("No worker is left for it")
    cancelled = tasks.pop("cancelled")
    assert stand.cancel(cancelled) == 202
    stand.kill()
    stand.go()
    stand.hub.release()
    stand.start("--workers", "4")
    for step, task in tasks.items():
        result, name = stand.done(task), f"acme/{step}"
        assert [p["html_url"] for p in stand.pulls if p["name"] == name] == [result["pr_url"]], step
        assert stand.branches(name) == ["main", result["branch_name"]], step
    stand.failed(cancelled, "cancelled")
    assert len(list(stand.work.glob("task_*"))) == len(tasks) + 1


def test_the_third_crash_in_a_row_ends_a_task(stand: Stand) -> None:
    stand.agent("block")
    task = stand.submit()
    for _ in range(3):
        wait_for(stand.reached)
        stand.fresh()
        stand.kill()
        stand.start()
    assert "3 times" in stand.failed(task, "interrupted")
    wait_for(stand.only_the_server_is_left)


def test_a_stop_puts_the_task_back_and_leaves_no_process(stand: Stand) -> None:
    stand.agent("setsid sleep 300 & block")
    task = stand.submit()
    waiting = stand.submit("Another")
    wait_for(stand.reached)
    stream = stand.stream(task)
    with socket.create_connection(stand.address()) as slow:
        slow.sendall(b"GET / HTTP/1.1\r\n")
        stand.stop()
        assert b"event: end" not in stream.read()
    with stand.database() as db:
        assert db.execute("SELECT status FROM tasks").fetchall() == [("pending",)] * 2
    stand.agent(HELLO)
    stand.start()
    assert "Taken up again: 2" in stand.log()
    assert stand.done(task) != stand.done(waiting)


def test_stopping_it_takes_no_work_and_says_so(stand: Stand) -> None:
    stand.agent("trap '' TERM; block")
    stand.start(limits={"KILL_GRACE": 1})
    stand.submit()
    wait_for(stand.reached)
    stand.signal(signal.SIGINT)
    wait_for(lambda: stand.ask("GET", "/health").json["status"] == "stopping")
    assert stand.ask("GET", "/health").status == 503
    refused = stand.post()
    assert (refused.status, refused.headers["Retry-After"]) == (503, "30")
    assert stand.gone() == 0


def test_a_second_signal_ends_it_at_once_and_its_agents_too(stand: Stand) -> None:
    stand.agent("trap '' TERM; block")
    stand.start(limits={"KILL_GRACE": 60})
    stand.submit()
    wait_for(stand.reached)
    stand.signal(signal.SIGTERM)
    wait_for(lambda: "stopping" in stand.log())
    assert stand.end(signal.SIGTERM) == 1
    wait_for(lambda: not stand.strays())


def test_a_running_task_is_cancelled_in_any_step(shared: Stand) -> None:
    tasks = submit_blocked(shared, "base", "agent", "test", "push", "pull")
    for task in tasks.values():
        assert shared.cancel(task) == 202
    for step, task in tasks.items():
        if step == "pull":
            shared.hub.release()
        assert "Cancelled" in shared.failed(task, "cancelled"), step
        assert shared.cancel(task) == 409
    wait_for(shared.only_the_server_is_left)


def test_a_failed_task_is_retried_as_a_new_one(shared: Stand) -> None:
    shared.agent("exit 1")
    task = shared.submit(ticket_id="AB-1")
    shared.failed(task, "agent_failed")
    shared.agent(HELLO)
    again = shared.ask("POST", f"/api/tasks/{task}/retry", "")
    assert (again.status, again.json["status"]) == (202, "pending")
    result = shared.done(again.json["task_id"])
    assert "/AB-1/" in result["branch_name"]
    assert shared.seen("stdin")[0] == shared.seen("stdin")[1]
    assert shared.ask("POST", f"/api/tasks/{again.json['task_id']}/retry", "").status == 409


def test_the_keeper_tells_of_a_low_disk_and_removes_what_is_past_its_time(stand: Stand) -> None:
    orphan = stand.work / "task_0000000"
    (orphan / "repo").mkdir(parents=True)
    os.utime(orphan, (1, 1))
    plans = [f"mkdir stiff; touch stiff/file; chmod 500 stiff; {HELLO}", "block; exit 1"]
    plans.append(f"(cd $HOME; mkdir -p c/e {'d/' * 1500}; chmod 0 c); {HELLO}")
    stand.commit(branch="odd.git", a="1")  # has a mirror's name, and must not confuse the keeper
    stand.start("--workers", "3", CODEBOT_TASK_RETENTION="1", limits={"DISK_LOW": 1 << 60})
    answer = stand.ask("GET", "/health")
    assert (answer.status, "MiB of disk left" in answer.json["warning"]) == (200, True)
    stiff, waits, deep = stand.submit_each(plans)
    for task in (stiff, deep):
        stand.done(task)
        stand.age(task)
    wait_for(stand.reached)
    stand.forgotten(stiff)
    stand.forgotten(deep)
    stand.logged("MiB of disk left")
    wait_for(lambda: len(stand.folders()) == 1)  # the others are not there by another name either
    assert stand.status(waits)["status"] == "running"
    [mirror] = (stand.work / "mirrors").rglob("widget.git")
    assert sh("git", "for-each-ref", "refs/codebot", cwd=mirror).count("\n") == 0  # its own
    stand.commit(branch="odd.git", a="2")
    stand.done(last := stand.submit())
    assert not list(stand.work.glob("mirrors/**/odd.git.lock"))
    stand.go()
    stand.ended(waits)
    os.utime(f"{mirror}.lock", (1, 1))  # when the mirror was used
    stand.age(last)
    stand.forgotten(waits)
    wait_for(lambda: not mirror.exists())
    assert stand.ask("GET", f"/api/tasks/{waits}/logs").status == 404


# ---- The database -----------------------------------------------------------------

MOVERS: dict[str, tuple[Callable[..., Any], dict[str, str]]] = {  # and what they may move
    "claim": (lambda store, task: store.claim(task), {"pending": "running"}),
    "complete": (
        lambda store, task: store.end(("tasks", task), "completed", 1, 0),
        {"running": "completed"},
    ),
    "fail": (lambda store, task: store.end(("tasks", task), "failed", 1, 0), {"running": "failed"}),
    "put back": (lambda store, task: store.put_back(("tasks", task)), {"running": "pending"}),
    "cancel": (  # of a running one it makes a note, for its worker
        lambda store, task: store.cancel(task),
        {"pending": "failed", "running": "running"},
    ),
}
WAYS = {"pending": (), "running": ("claim",), "completed": ("claim", "complete")}
WAYS |= {"failed": ("claim", "fail")}


@pytest.mark.parametrize("state", codebot.MOVES)
def test_a_state_moves_only_as_moves_has_it(tmp_path: Path, state: str) -> None:
    store = codebot.Store(str(tmp_path / "db"))
    fields = {**dict.fromkeys(codebot.FIELDS), "repository_url": "u", "description": "d"}
    for move, moves in MOVERS.values():
        task, _ = store.add(fields, None, None, 9)
        for step in WAYS[state]:
            MOVERS[step][0](store, task)
        assert store.get(task)["status"] == state
        with contextlib.nullcontext() if state in moves else pytest.raises(codebot.WrongState):
            move(store, task)
        found = store.get(task)["status"]
        assert found == moves.get(state, state)
        assert found == state or found in codebot.MOVES[state]


def test_adds_that_meet_share_a_transaction_and_no_answer(tmp_path: Path) -> None:
    store = codebot.Store(str(tmp_path / "db"))
    fields = {**dict.fromkeys(codebot.FIELDS), "repository_url": "u", "description": "d"}
    old, _ = store.add(fields, "key", "a", 9)
    with concurrent.futures.ThreadPoolExecutor(24) as pool, store._lock:  # till all wait
        known = [pool.submit(store.add, fields, "key", body, 9) for body in "aab"]
        asks = [pool.submit(store.add, fields, None, None, 9) for _ in range(20)]
    assert [ask.result() for ask in known[:2]] == [(old, False)] * 2
    added = {ask.result()[0] for ask in asks if not ask.exception()}
    errors = [error for ask in [*known, *asks] if (error := ask.exception())]
    assert sorted(getattr(error, "status", 500) for error in errors) == [409] + [503] * 12
    assert store.pending - 1 == len(added) == len(store.read("SELECT 1 FROM tasks")) - 1 == 8


def test_a_database_that_goes_away_makes_it_unhealthy_and_nothing_is_taken(stand: Stand) -> None:
    assert stand.ask("GET", "/health").status == 200
    for path in stand.work.glob("codebot.db*"):
        path.unlink()
    answer = wait_for(lambda: (a := stand.ask("GET", "/health")).status == 503 and a)
    assert answer.json["status"] == "unhealthy"
    refused = stand.post()
    assert (refused.status, refused.headers["Retry-After"]) == (503, "10")


def test_a_locked_database_refuses_work_but_delays_neither_readers_nor_a_stop(stand: Stand) -> None:
    stand.start()
    with stand.database() as other:
        other.isolation_level = None
        other.execute("BEGIN IMMEDIATE")
        with concurrent.futures.ThreadPoolExecutor() as pool:
            asked = [pool.submit(stand.post) for _ in range(6)]
            assert stand.ask("GET", "/api/tasks").json["count"] == 0
            assert not any(answer.done() for answer in asked)
            for answer in asked:
                assert answer.result().status == 503
                assert "Retry-After" in answer.result().headers
        other.execute("ROLLBACK")
        stand.done(stand.submit())
        other.execute("BEGIN IMMEDIATE")
        assert stand.end(signal.SIGTERM) == 0


def test_a_database_of_another_schema_is_refused(stand: Stand) -> None:
    args = ("serve", "--port", "0", "--work-dir", str(stand.work))
    stand.work.mkdir()
    file = stand.work / "codebot.db"
    for statement in ("PRAGMA user_version=99", "CREATE TABLE tasks(id)"):
        with stand.database() as db:
            db.execute(statement)
        done = stand.run(*args)
        assert (done.returncode, "has schema" in done.stderr) == (2, True), statement
        file.unlink()
    file.write_bytes(b"no database" * 100)
    done = stand.run(*args)
    assert (done.returncode, "cannot be used" in done.stderr) == (2, True)


# ---- The API ----------------------------------------------------------------------


def test_every_api_route_needs_a_key(shared: Stand) -> None:
    guarded = 0
    for verb, pattern, *_ in codebot.routes():
        path = re.sub(r"\(\?P<\w+>[^)]*\)", "x", pattern)
        if path.startswith("/api/") or path == "/metrics":
            guarded += 1
            for key in ("", "wrong-key", KEY[:-1], KEY + "x", "é"):
                answer = shared.ask(
                    verb, path, "" if verb == "POST" else None, key="", X_API_Key=key
                )
                assert (answer.status, answer.json["error"]) == (401, "Unauthorized")
                assert "Bearer" in answer.headers["WWW-Authenticate"]
            assert shared.ask(verb, path, "", key="").status == 401
            assert shared.ask(verb, path, "", key="", Authorization=f"Basic {KEY}").status == 401
            assert shared.ask(verb, path, "", key="", X_API_Key=KEY).status != 401
            assert shared.ask(verb, path, "", key="other-key").status != 401
    assert guarded == 7
    assert shared.ask("GET", "/health", key="").status == 200


BAD_BODIES = [
    (b"", "not JSON"),
    (b"{", "not JSON"),
    (b"\xff\xfe", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b"[]", "array"),
    (b'"text"', "string"),
    (b"null", "null"),
    (b"7", "number"),
    (b"true", "boolean"),
]
BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"repository_url": None}, "repository_url: is missing"),
    ({"description": None}, "description: is missing"),
    ({"description": ""}, "description: is empty"),
    ({"description": " \n\t"}, "description: is empty"),
    ({"description": 7}, "description: is a JSON number"),
    ({"description": ["a"]}, "description: is a JSON array"),
    ({"ticket_id": False}, "ticket_id: is a JSON boolean"),
    ({"test_command": {}}, "test_command: is a JSON object"),
    *[
        ({name: "x" * (most + 1)}, f"{name}: has {most + 1}")
        for name, most in codebot.FIELDS.items()
    ],
    ({"description": "a\0b"}, "description: has the character U+0000"),
    ({"ticket_id": "a\nb"}, "ticket_id: has the character U+000A"),
    ({"ticket_summary": "a\x7f"}, "ticket_summary: has the character U+007F"),
    ({"test_command": "a\x1b[0m"}, "test_command: has the character U+001B"),
    ({"description": "\ud800"}, "description: has the character U+D800"),
    ({"descripton": "x"}, "Unknown field 'descripton'; did you mean 'description'"),
    ({"zzz": "x"}, "Unknown field 'zzz'; known are repository_url"),
    *[
        ({"base_branch": name}, "base_branch: ")
        for name in ("a b", "-x", "a..b", "/a", "a/", "a.lock", "a~1", "@", "HEAD", "a//b", "x@{1}")
    ],
]
BAD_URLS = [
    "acme/widget", "/etc", "file:///etc", "../x", "ext::sh -c id", "--upload-pack=x", "-x",
    "ssh://git@github.com/acme/widget", "https://github.com/acme/widget",
    "git@github.com:acme/widget.git", "HUB/acme", "HUB/acme/widget/tree/main",
    "HUB/acme/widget?x=1", "HUB/acme/widget#x", "HUB/acme/..", "HUB/../widget", "HUB/acme/.git",
    "HUB/-acme/widget", "HUB/acme/wid get", "HUB/acme/widget%2e", "HUB:1/acme/widget",
    "HUB//acme/widget", "AT/acme/widget",
]  # fmt: skip


def test_bad_input_is_refused_naming_the_field_and_nothing_is_stored(shared: Stand) -> None:
    at = shared.hub.url.replace("//", "//user:word@")
    urls = [url.replace("HUB", shared.hub.url).replace("AT", at) for url in BAD_URLS]
    cases: list[tuple[Any, str]] = [*BAD_BODIES]
    cases += [(shared.task(**fields), words) for fields, words in BAD_FIELDS]
    cases += [(shared.task(repository_url=url), "repository_url: expected") for url in urls]
    before = shared.ask("GET", "/api/tasks").json
    for body, words in cases:
        answer = shared.post(body)
        assert answer.status == 400, (body, answer)
        assert words in answer.json["message"], body
        assert answer.json["error"] == "Bad Request"
    assert shared.ask("GET", "/api/tasks").json == before


def test_a_url_is_taken_in_each_of_its_forms(shared: Stand) -> None:
    urls, config = (
        [f"{shared.url()}.git", f"{shared.url()}/"],
        codebot.Config(api_url=shared.hub.url),
    )
    names = {codebot.parse_url(config, url).name for url in (*urls, shared.url("ACME/Widget"))}
    assert names == {shared.name, "ACME/Widget"}
    for task in [shared.submit(repository_url=url) for url in urls]:
        shared.done(task)


def test_without_github_any_remote_is_taken_but_no_helper_or_option() -> None:
    config = codebot.Config(no_github=True)
    remotes = (
        "https://host/a/b",
        "ssh://git@host/a/b.git",
        "git@host:a/b.git",
        "file:///a",
        "/a/b",
    )
    for url in remotes:
        assert codebot.parse_url(config, url).url == url
    for url in ("https://user:word@host/a/b", "ext::sh", "-x", "-x@h:p", "a@-x:p", "a/b", ""):
        with pytest.raises(ValueError, match="expected"):
            codebot.parse_url(config, url)


def test_branch_names_are_judged_as_git_judges_them() -> None:
    parts = ["a", "/", ".", "..", "-", "@", "{", "~", "^", ":", "?", "*", "[", "\\", " ", ".lock"]
    for name in map("".join, itertools.product(parts, repeat=2)):
        done = subprocess.run(["git", "check-ref-format", "--branch", name], capture_output=True)  # noqa: PLW1510
        assert codebot.is_branch_name(name) <= (done.returncode == 0), name
    for name in ("main", "release/1.2", "a-b_c", "übung", "a@b", "x.y"):
        assert codebot.is_branch_name(name)


def test_a_repository_that_is_not_allowed_is_403(stand: Stand) -> None:
    stand.start(CODEBOT_ALLOWED_REPOSITORIES="acme/g*, other/widget")
    answer = stand.post()
    assert (answer.status, answer.json["error"]) == (403, "Forbidden")
    assert "acme/widget" in answer.json["message"]
    allowed = stand.task(repository_url=stand.url("Acme/Gadget"))
    assert stand.post(allowed).status == 202


def test_what_is_submitted_is_answered_with_its_address(shared: Stand) -> None:
    shared.agent("block; " + HELLO)
    answer = shared.post(shared.task(ticket_id=None))
    task = answer.json["task_id"]
    assert answer.json == {
        "task_id": task,
        "status": "pending",
        "message": "Task queued successfully",
    }
    assert answer.headers["Location"] == f"/api/tasks/{task}/status"
    wait_for(shared.reached)
    status = shared.status(task)
    assert (status["status"], status["phase"], status["completed_at"]) == ("running", "agent", None)
    shared.go()
    status = shared.ended(task)
    for name in ("submitted_at", "started_at", "completed_at"):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", status[name])
    assert "phase" not in status
    assert shared.ask("GET", "/api/tasks/nothing/status").status == 404


def test_an_idempotency_key_gives_the_same_task_also_at_once(shared: Stand) -> None:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        asks = [pool.submit(shared.post, Idempotency_Key="k1") for _ in range(16)]
    [task] = {ask.result().json["task_id"] for ask in asks}
    other = shared.post(shared.task("Other"), Idempotency_Key="k1")
    assert (other.status, other.json["error"]) == (409, "Conflict")
    second = shared.post(Idempotency_Key="k2").json["task_id"]
    assert shared.post(Idempotency_Key="").status == 400
    assert shared.post(Idempotency_Key="x" * 256).status == 400
    newest = shared.ask("GET", "/api/tasks?limit=2").json["tasks"]
    assert [one["task_id"] for one in newest] == [second, task]
    assert shared.done(task) != shared.done(second)


def test_a_full_queue_refuses_and_what_is_cancelled_in_it_never_starts(stand: Stand) -> None:
    stand.agent("block; " + HELLO)
    stand.start(CODEBOT_MAX_QUEUE_SIZE="2")
    first = stand.submit()
    wait_for(stand.reached)
    second, third = stand.submit("Another"), stand.submit("The last")
    assert stand.ask("GET", "/health").json["task_queue_size"] == 2
    answer = stand.post()
    assert (answer.status, answer.headers["Retry-After"]) == (503, "60")
    assert stand.cancel(second) == 202
    assert "before it started" in stand.failed(second, "cancelled")
    stand.go()
    assert stand.done(first) != stand.done(third)
    assert (len(stand.seen("argv")), stand.status(second)["started_at"]) == (2, None)


def test_tasks_are_listed_newest_first_in_pages(shared: Stand) -> None:
    shared.agent('case $(cat "$here/stdin") in *bad*) exit 1;; esac; ' + HELLO)
    tasks = [shared.submit(text) for text in ("one", "a bad one", "x" * 5000)]
    for task in tasks:
        shared.ended(task)

    def ids(query: str) -> list[str]:
        answer = shared.ask("GET", f"/api/tasks{query}").json
        assert answer["count"] == len(answer["tasks"])
        return [task["task_id"] for task in answer["tasks"]]

    every = ids("")
    assert (every[:3], every[3:]) == (tasks[::-1], ids(f"?limit=97&before={tasks[0]}"))
    assert ids("?limit=1000&status=")[:100] == every
    assert ids("?limit=2") == tasks[:0:-1]
    assert ids(f"?limit=1&before={tasks[1]}") == [tasks[0]]
    assert ids("?limit=1&status=failed") == [tasks[1]]
    assert ids("?status=running") == []
    names = "task_id status submitted_at started_at completed_at repository_url description"
    [shown] = shared.ask("GET", "/api/tasks?limit=1").json["tasks"]
    assert list(shown) == names.split()
    for query in (
        "limit=0",
        "limit=1001",
        "limit=x",
        "limit=-1",
        "status=done",
        "x=1",
        "limit=1&limit=2",
    ):
        answer = shared.ask("GET", f"/api/tasks?{query}")
        assert (
            answer.status,
            query.partition("=")[0] in answer.json["message"] or "x=1" == query,
        ) == (400, True)
    assert shared.ask("GET", "/api/tasks?before=nothing").status in (400, 404)


def test_logs_are_read_from_where_one_was(shared: Stand) -> None:
    task = shared.submit()
    shared.done(task)
    wait_for(lambda: shared.events(task)[-1] == "codebot: Completed")
    answer = shared.ask("GET", f"/api/tasks/{task}/logs").json
    assert answer["count"] == len(answer["events"]) > 5
    seqs = [event["seq"] for event in answer["events"]]
    assert seqs == sorted(set(seqs))
    rest = shared.ask("GET", f"/api/tasks/{task}/logs?after={seqs[2]}").json["events"]
    assert rest == answer["events"][3:]
    assert shared.ask("GET", f"/api/tasks/{task}/logs?after=x").status == 400


def test_a_stream_gives_events_live_and_ends_with_the_task(shared: Stand) -> None:
    shared.agent(f"say first; block; say second; {HELLO}")
    task = shared.submit()
    with shared.stream(task) as stream:
        assert stream.headers["Content-Type"] == "text/event-stream"
        text = ""
        while "first" not in text:
            text += stream.readline().decode()
        assert not (shared.top / "go").exists()
        shared.go()
        text += stream.read().decode()
    assert text.endswith("event: end\ndata: {}\n\n")
    ids = re.findall(r"^id: (\d+)$", text, re.MULTILINE)
    events = [json.loads(line[6:]) for line in text.split("\n") if line.startswith('data: {"')]
    assert [str(event["seq"]) for event in events] == ids
    assert {"first", "second"} <= {event["message"] for event in events}
    with shared.stream(task, **{"Last-Event-ID": ids[-3]}) as stream:
        again = stream.read().decode()
    assert re.findall(r"^id: (\d+)$", again, re.MULTILINE) == ids[-2:]


def test_streams_are_limited_and_one_that_is_not_read_is_dropped(stand: Stand) -> None:
    stand.agent(f"block; for n in $(seq 4000); do say {'x' * 1900}; done; {HELLO}")
    stand.start(limits={"STREAMS": 1, "ARRIVE": 1})
    task = stand.submit()
    wait_for(stand.reached)
    head = f"GET /api/tasks/{task}/logs HTTP/1.1\r\nAccept: text/event-stream\r\nX-API-Key: {KEY}"
    with stand.slow_reader(f"{head}\r\n\r\n") as deaf:
        deaf.recv(10)
        refused = stand.stream(task)
        assert (refused.status, refused.headers["Retry-After"]) == (503, "30")
        stand.go()
        stand.done(task)
        wait_for(lambda: stand.stream(task).status == 200)
        with contextlib.suppress(ConnectionError):
            assert b"event: end" not in b"".join(iter(lambda: deaf.recv(1 << 16), b""))


def test_metrics_are_in_prometheus_format(shared: Stand) -> None:
    before = read_metrics(shared)
    good, bad = shared.submit_each([HELLO, "exit 1"])
    shared.done(good)
    shared.failed(bad, "agent_failed")
    now = read_metrics(shared)
    change = {name: round(value - before.get(name, 0), 3) for name, value in now.items()}
    assert change['codebot_tasks{status="completed",reason=""}'] == 1
    assert change['codebot_tasks{status="failed",reason="agent_failed"}'] == 1
    assert change["codebot_agent_dollars_total"] == 0.25
    assert change["codebot_task_seconds_total"] > 0
    assert change["codebot_github_requests_total"] >= 2


def read_metrics(stand: Stand) -> dict[str, float]:
    answer = stand.ask("GET", "/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    kinds: dict[str, str] = {}
    values: dict[str, float] = {}
    for line in answer.text.splitlines():
        if line.startswith("# "):
            kinds |= dict([line.split()[2:4]]) if line.startswith("# TYPE") else {}
        else:
            match = re.fullmatch(r'([a-z_]+)(\{(?:[a-z_]+="[^"]*",?)*\})? ([0-9.e+-]+)', line)
            assert match, line
            assert match[1] in kinds, line
            values[match[1] + (match[2] or "")] = float(match[3])
    assert all((kind == "counter") == name.endswith("_total") for name, kind in kinds.items())
    return values


# ---- HTTP -------------------------------------------------------------------------


def test_unknown_paths_are_404_and_wrong_methods_405(shared: Stand) -> None:
    for path in ("/", "/api", "/api/tasks/", "/api/tasks/a/b/status", "/health/", "//health"):
        if path != "/":
            assert shared.ask("GET", path).status == 404, path
    for method, path, allow in (
        ("POST", "/health", "GET"),
        ("GET", "/api/tasks/submit", "POST"),
        ("DELETE", "/api/tasks/x/cancel", "POST"),
        ("PUT", "/api/tasks", "GET"),
    ):
        answer = shared.ask(method, path, "")
        assert (answer.status, answer.headers["Allow"]) == (405, allow)


HEADS = [
    (b"nonsense\r\n\r\n", 400),
    (b"GET /health\r\n\r\n", 400),
    (b"get /health HTTP/1.1\r\n\r\n", 400),
    (b"GET health HTTP/1.1\r\n\r\n", 400),
    (b"GET /health HTTP/2.0\r\n\r\n", 400),
    (b"GET /h\xc3\xa9 HTTP/1.1\r\n\r\n", 400),
    (b"GET /health HTTP/1.1\r\nbad line\r\n\r\n", 400),
    (b"GET /health HTTP/1.1\r\nHost : x\r\n\r\n", 400),
    (b"GET /health HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
    (b"POST /x HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nab", 400),
    (b"POST /x HTTP/1.1\r\nContent-Length: -2\r\n\r\n", 400),
    (b"POST /x HTTP/1.1\r\nContent-Length: two\r\n\r\n", 400),
    (b"POST /x HTTP/1.1\r\nX: a\nb\r\n\r\n", 400),
    (b"POST /x HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
    (b"POST /x HTTP/1.1\r\nContent-Length: 1048577\r\n\r\nab", 413),
    (b"POST /x HTTP/1.1\r\nContent-Length: 99999999999999999\r\n\r\nab", 413),
    (b"GET /health HTTP/1.1\r\nX: " + b"x" * 40_000 + b"\r\n\r\n", 431),
    (b"x" * 40_000, 431),
    (b"GET /health HTTP/1.0\r\n\r\n", 200),
    (b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n", 200),
]


def test_heads_of_all_kinds_get_the_right_answer(shared: Stand) -> None:
    for data, status in HEADS:
        answer = shared.raw(data)
        assert answer.startswith(f"HTTP/1.1 {status} ".encode()), data[:100]
        assert b"Connection: close" in answer
        head, _, body = answer.partition(b"\r\n\r\n")
        assert json.loads(body)
        assert f"Content-Length: {len(body)}".encode() in head


def test_a_body_of_the_greatest_length_is_taken(shared: Stand) -> None:
    body = json.dumps(shared.task()).ljust(1 << 20)
    assert shared.post(body + " ").status == 413
    shared.done(shared.post(body).json["task_id"])


def test_head_is_get_without_the_body(shared: Stand) -> None:
    got, head = shared.ask("GET", "/health"), shared.ask("HEAD", "/health")
    assert (head.status, head.text) == (200, "")
    assert head.headers["Content-Length"] == str(len(got.text))
    assert head.headers["X-Content-Type-Options"] == "nosniff"


def test_a_connection_is_kept_and_requests_may_be_sent_ahead(shared: Stand) -> None:
    one = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    post = f"POST /api/tasks/x/cancel HTTP/1.1\r\nX-API-Key: {KEY}\r\nContent-Length: 2\r\n\r\n{{}}"
    last = b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n"
    answer = shared.raw(one * 3 + post.encode() + last)
    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"200", b"200", b"200", b"404", b"200"]
    old = b"GET /health HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
    assert shared.raw(old + last).count(b"HTTP/1.1 200") == 1  # a client of 1.0 waits for the end


def test_polls_sent_ahead_without_end_hold_up_nobody(shared: Stand) -> None:
    polls = b"GET /api/tasks/x/status HTTP/1.1\r\n\r\n" * 1000
    with shared.connect() as sock:
        ways = (lambda: sock.sendall(polls) or True, lambda: sock.recv(1 << 16))

        def repeat(way: Callable[[], Any]) -> None:
            with contextlib.suppress(OSError):
                while way():
                    pass

        threads = [threading.Thread(target=repeat, args=(way,)) for way in ways]
        for thread in threads:
            thread.start()
        assert [shared.ask("GET", "/health").status for _ in range(9)] == [200] * 9
        sock.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()


def test_a_client_that_expects_100_continue_gets_it(shared: Stand) -> None:
    body = json.dumps(shared.task()).encode()
    head = f"POST /api/tasks/submit HTTP/1.1\r\nX-API-Key: {KEY}\r\nExpect: 100-continue\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with shared.connect() as sock:
        sock.sendall(head.encode())
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(body)
        answer = sock.recv(1000)
    assert answer.startswith(b"HTTP/1.1 202")
    shared.done(json.loads(answer.partition(b"\r\n\r\n")[2])["task_id"])


def test_a_request_that_drips_is_dropped_and_one_that_is_idle_too(stand: Stand) -> None:
    stand.start(limits={"ARRIVE": 1, "IDLE": 1})
    drip, idle = (stand.connect() for _ in range(2))
    with drip, idle:
        idle.sendall(b"GET /health HTTP/1.1\r\n\r\n")
        began, tick = time.monotonic(), threading.Event()
        with contextlib.suppress(ConnectionError):
            for letter in b"GET /health HTTP/1.1\r\nX: " + b"x" * 1000:
                drip.sendall(bytes([letter]))
                tick.wait(0.05)
        assert 0.5 < time.monotonic() - began < 10
        answers = b"".join(iter(lambda: idle.recv(1000), b""))
        assert answers.count(b"HTTP/1.1") == 1


def test_of_too_many_connections_the_longest_idle_is_dropped(stand: Stand) -> None:
    stand.start(limits={"CONNECTIONS": 32})
    with contextlib.ExitStack() as stack:
        at = ("127.0.0.1", stand.port)
        idle = [stack.enter_context(socket.create_connection(at, timeout=10)) for _ in range(40)]
        assert stand.ask("GET", "/health").status == 200
        for sock in idle[:8]:
            assert sock.recv(1) == b""
        idle[-1].sendall(b"GET /health HTTP/1.1\r\n\r\n")
        assert idle[-1].recv(100).startswith(b"HTTP/1.1 200")


def test_of_too_many_bytes_unfinished_the_most_are_dropped(stand: Stand) -> None:
    stand.start(limits={"BUFFERED": 300_000})
    head = b"POST /api/tasks/submit HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n"
    with stand.connect() as big:
        big.sendall(head + b"x" * 200_000)
        with stand.connect() as small:
            small.sendall(head + b"x" * 150_000)
            with contextlib.suppress(ConnectionError):
                assert big.recv(1) == b""
            assert stand.ask("GET", "/health").status == 200
            small.settimeout(0.2)
            with pytest.raises(socket.timeout):
                small.recv(1)
            with stand.connect() as third:
                third.sendall(head + b"x" * 140_000)
                assert stand.ask("GET", "/health").status == 200
                whole = b"GET /health HTTP/1.1\r\nConnection: close\r\nX: " + b"x" * 30_000
                assert b" 200 OK" in stand.raw(whole + b"\r\n\r\n")  # though it fills the rest


def test_an_answer_that_is_long_reaches_a_slow_reader_whole(stand: Stand) -> None:
    stand.start(limits={"MESSAGE": 10**6}, CODEBOT_ALLOWED_REPOSITORIES="*")
    stand.agent(f"exec 3<&1; for n in $(seq 9); do say $(printf %0100000d 7); done; {HELLO}")
    task = stand.submit()
    stand.done(task)
    head = f"GET /api/tasks/{task}/logs HTTP/1.1\r\nX-API-Key: {KEY}\r\nConnection: close\r\n\r\n"
    with stand.slow_reader(head) as slow:
        answer = b"".join(iter(lambda: slow.recv(3000), b""))
    body = answer.partition(b"\r\n\r\n")[2]
    assert len(body) > 900_000
    assert json.loads(body)["task_id"] == task


def start_tls(stand: Stand) -> ssl.SSLContext:
    cert = str(stand.top / "keys" / "cert.pem")
    stand.start("--tls-cert", cert, "--tls-key", str(stand.key))
    return ssl.create_default_context(cafile=cert)


def test_https_is_spoken_when_a_certificate_is_given(stand: Stand) -> None:
    context = start_tls(stand)
    assert "https://localhost" in stand.log()
    with stand.connect() as plain:
        plain.sendall(b"GET /health HTTP/1.1\r\n\r\n")
        web = http.client.HTTPSConnection("localhost", stand.port, timeout=30, context=context)
        for _ in range(2):
            web.request("GET", "/health")
            assert json.loads(web.getresponse().read())["status"] == "healthy"
        web.close()


def test_an_error_inside_is_500_and_tells_nothing(stand: Stand) -> None:
    stand.start(limits={"EVENTS": 10, "FIELDS": {"repository_url": "no number"}})
    answer = stand.post({"repository_url": "x"})
    assert answer.json == {"error": "Internal Server Error", "message": "internal error"}
    assert answer.status == 500
    assert "Traceback" in stand.log()


# ---- Settings ---------------------------------------------------------------------

BAD_SETTINGS = {
    "CODEBOT_MAX_WORKERS": "0",
    "CODEBOT_REVIEW_WORKERS": "0",
    "CODEBOT_POLL_INTERVAL": "0",
    "CODEBOT_MAX_QUEUE_SIZE": "many",
    "CODEBOT_TASK_RETENTION": "-1",
    "GITHUB_APP_INSTALLATION_ID": "x1",
    "GITHUB_API_URL": "http://github.com",
    "GITHUB_ENTERPRISE_URL": "https://user@ghe",
    "CODEBOT_CLAUDE_COMMAND": "claude 'x",
    "CODEBOT_TASK_TIMEOUT": "1.5",
    "CODEBOT_STALL_TIMEOUT": "9" * 20,
    "CODEBOT_MAX_BUDGET_USD": "0",
    "CODEBOT_MAX_TURNS": "0",
    "CODEBOT_TEST_ATTEMPTS": "101",
    "CODEBOT_AGENT_ENV": "CODEBOT_API_KEYS",
}


def test_all_bad_settings_are_told_at_once(stand: Stand) -> None:
    args = ("--tls-cert", "x", "--work-dir", str(stand.work))
    env = {**BAD_SETTINGS, "GITHUB_APP_ID": "", "GITHUB_APP_PRIVATE_KEY_PATH": "/nonexistent"}
    done = stand.run("serve", *args, CODEBOT_API_KEYS=" , ", **env)
    assert (done.returncode, done.stdout) == (2, "")
    for name, value in BAD_SETTINGS.items():
        assert f"codebot: {name}: {value!r} is not " in done.stderr, name
    assert "GITHUB_APP_ID: is not set" in done.stderr
    assert "'/nonexistent' is not a file that can be read" in done.stderr
    assert "CODEBOT_API_KEYS: is not set" in done.stderr
    assert "--tls-cert, --tls-key: one is given" in done.stderr
    assert "--tls-cert: 'x' is not a file that can be read" in done.stderr
    assert not stand.work.exists()
    done = stand.run("serve", "--work-dir", "w[1]", GITHUB_API_URL=None)
    assert (done.returncode, "w[1]' is not a path in UTF-8 without" in done.stderr) == (2, True)


def test_flags_beat_the_environment_which_beats_the_env_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = ["CODEBOT_MAX_WORKERS=2", "CODEBOT_MAX_QUEUE_SIZE=2", "CODEBOT_TASK_TIMEOUT=2"]
    (tmp_path / ".env").write_text("\n".join([*lines, "CODEBOT_API_KEYS=a-key,b-key"]))
    monkeypatch.setenv("CODEBOT_MAX_WORKERS", "3")
    monkeypatch.setenv("CODEBOT_MAX_QUEUE_SIZE", "3")
    monkeypatch.setenv("CODEBOT_SANDBOX", "none")
    flags = {"workers": 4, "no_github": True, "port": None}
    config = codebot.load_config(flags)
    found = (config.workers, config.queue_size, config.task_timeout, config.port)
    assert found == (4, 3, 2, 5000)
    assert config.api_keys == ("a-key", "b-key")
    with pytest.raises(codebot.Unusable, match="--enable-polling: is given with --no-github"):
        codebot.load_config({**flags, "enable_polling": True})


def test_the_env_file_is_read_as_people_write_it(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text(
        "# a comment\n\nA=1\nexport B = two words # and why\nC='single # quoted'\n"
        'D="double"\nE=\n  F=x#y\nG= # nothing\n',
        "utf-8-sig",
    )
    found = {"A": "1", "B": "two words", "C": "single # quoted", "D": "double", "E": "", "F": "x#y"}
    found["G"] = ""
    wrong: list[str] = []
    assert codebot.read_env_file(str(file), wrong) == found
    assert codebot.read_env_file(str(tmp_path / "nothing"), wrong) == {}
    assert wrong == []
    file.write_text("A=1\nno equals sign\nB=2\n1A=2\nC='x' y\n")
    assert codebot.read_env_file(str(file), wrong) == {"A": "1", "B": "2", "C": "'x' y"}
    assert wrong == [f"{file}, line {number}: expected NAME=value" for number in (2, 4)]
    file.write_bytes(b"A=\xff\n")
    assert codebot.read_env_file(str(file), wrong) == {}
    assert "cannot be read" in wrong[2]


def test_the_repr_of_the_settings_has_no_secret() -> None:
    config = codebot.Config(api_keys=(KEY,), variables={"ANTHROPIC_API_KEY": MODEL_KEY})
    assert KEY not in repr(config)
    assert MODEL_KEY not in repr(config)


def test_settings_are_the_same_in_the_code_the_readme_and_the_example() -> None:
    named = re.compile(r"(?:CODEBOT|GITHUB)_[A-Z_]+")
    code = {*re.findall('"((?:CODEBOT|GITHUB)_[A-Z_]+)"', inspect.getsource(codebot.Config))}
    example = re.findall(r"^#? ?([A-Z_]+)=", (HERE / ".env.example").read_text(), re.MULTILINE)
    rows = re.findall(r"^\|([^|]*`[^|]*)\|", (HERE / "README.md").read_text(), re.MULTILINE)
    readme = {name for row in rows for name in named.findall(row)}
    assert {name for name in example if named.fullmatch(name)} == code
    assert readme == code


# ---- Commands ---------------------------------------------------------------------


def test_the_banner_tells_where_things_are(stand: Stand) -> None:
    stand.start(CODEBOT_API_KEYS="first-key,second-key")
    at = f"http://localhost:{stand.port}"
    banner = (
        "HTTP API enabled with 2 API key(s)\n"
        f"Starting server on port {stand.port}...\n"
        f"API endpoints: {at}/api/tasks/submit\n"
        f"               {at}/api/tasks/{{task_id}}/status\n"
        f"               {at}/api/tasks\n"
    )
    assert banner in stand.log()
    assert f"Page:          {at}/\n" in stand.log()
    assert re.search(r"^Sandbox: +NONE: the agent can read codebot's", stand.log(), re.MULTILINE)


def test_a_second_server_on_the_port_or_the_work_dir_is_refused(shared: Stand) -> None:
    second = shared.run("serve", "--port", str(shared.port), "--work-dir", str(shared.top / "w2"))
    assert (second.returncode, "Address already in use" in second.stderr) == (2, True)
    second = shared.run("serve", "--port", "0", "--work-dir", str(shared.work))
    assert shared.server is not None
    assert f"in use by another codebot, process {shared.server.pid}" in second.stderr
    assert second.returncode == 2


def test_with_debug_it_starts_again_when_the_env_file_changes(stand: Stand) -> None:
    env_file = stand.here / ".env"
    env_file.write_text("CODEBOT_API_KEYS=the-first-key\n")
    stand.start("--debug", CODEBOT_API_KEYS=None)
    size = len(stand.log())
    env_file.write_text("CODEBOT_API_KEYS=the-second-key\n")
    os.utime(env_file, (1, 1))
    stand.ready(size)
    assert stand.ask("GET", "/api/tasks", key="the-first-key").status == 401
    assert stand.ask("GET", "/api/tasks", key="the-second-key").status == 200


def test_run_does_one_task_and_prints_its_result(stand: Stand) -> None:
    args = ("--repository-url", stand.url(), "--description", "Say hello")
    done = stand.run("run", *args)
    status = json.loads(done.stdout)
    assert (done.returncode, status["status"]) == (0, "completed")
    assert stand.pulls[0]["html_url"] == status["result"]["pr_url"]
    assert re.search(r"^ +\d+\.\d s  codebot +Phase: agent$", done.stderr, re.MULTILINE)
    assert status["result"]["work_dir"].startswith(str(stand.top / "tmp"))


def test_run_takes_its_task_from_a_file_or_stdin(stand: Stand) -> None:
    file = stand.top / "task.json"
    file.write_text(json.dumps(stand.task("From a file")))
    assert stand.run("run", "--task", str(file), "--ticket-id", "X-1").returncode == 0
    done = stand.run("run", "--task", "-", stdin=json.dumps(stand.task("From stdin")))
    assert done.returncode == 0
    assert [pull["title"] for pull in stand.pulls] == ["X-1: From a file", "From stdin"]


def test_run_tells_failure_by_1_and_bad_input_by_2(stand: Stand) -> None:
    stand.agent("exit 1")
    done = stand.run("run", "--task", "-", stdin=json.dumps(stand.task()))
    assert (done.returncode, json.loads(done.stdout)["reason"]) == (1, "agent_failed")
    for args, stdin, words in (
        (("--task", "-"), "{", "Expecting"),
        (("--task", "-"), "[]", "expected as a JSON object"),
        (("--task", "/nonexistent"), "", "No such file"),
        (("--description", "x"), "", "repository_url: is missing"),
        (("--repository-url", "/etc", "--description", "x"), "", "repository_url: expected"),
    ):
        done = stand.run("run", *args, stdin=stdin)
        assert (done.returncode, done.stdout) == (2, ""), done
        assert words in done.stderr


def test_check_finds_all_in_order(stand: Stand) -> None:
    done = stand.run("check", "--work-dir", str(stand.work))
    assert done.returncode == 0, done.stdout
    for words in ("git: git version", "openssl: OpenSSL", "2.1.0 (Claude Code", "claude's login"):
        assert re.search(f"^ok   .*{re.escape(words)}", done.stdout, re.MULTILINE), done.stdout
    for words in ("the App is Acme Bot", "installation 678 of acme", "permission contents: write"):
        assert re.search(f"^ok   .*{words}", done.stdout, re.MULTILINE), done.stdout
    assert "FAIL" not in done.stdout
    assert re.search("^warn .*sandbox: NONE", done.stdout, re.MULTILINE)


def test_check_tells_what_is_wrong_and_the_remedy(stand: Stand) -> None:
    stand.hub.permissions["issues"] = "read"
    stand.hub.events.remove("issue_comment")
    stand.key.chmod(0o644)
    env = {"CODEBOT_CLAUDE_COMMAND": "/nonexistent/claude", "ANTHROPIC_API_KEY": ""}
    done = stand.run("check", "--work-dir", str(stand.work), **env)
    assert done.returncode == 1
    for line in (
        r"FAIL .*claude.*: 2\.0 or newer is needed",
        "warn .*login: set one of ANTHROPIC_API_KEY",
        f"warn .*others can read it: chmod .* {stand.key}",
        "FAIL .*permission issues: read: write is needed",
        "ok .*webhook event pull_request$",
        "warn .*webhook event issue_comment: subscribe the App to it, or poll",
    ):
        assert re.search(f"^{line}", done.stdout, re.MULTILINE), done.stdout
    stand.key.write_text("no key")
    assert "FAIL  GitHub: openssl cannot sign" in stand.run("check").stdout
    done = stand.run("check", CODEBOT_MAX_WORKERS="x", GITHUB_APP_ID="")
    assert (done.returncode, done.stdout.count("FAIL  settings")) == (1, 2)


def test_demo_does_the_main_job_and_leaves_nothing(stand: Stand) -> None:
    before = sorted(stand.top.rglob("*"))
    done = stand.run("demo", GITHUB_APP_ID="", CODEBOT_API_KEYS="", CODEBOT_SANDBOX="")
    assert done.returncode == 0, done.stderr
    assert "stand-in" in done.stdout
    assert '+print("Hello from codebot")' in done.stdout
    states = re.findall(r"^The task: +(\w+)", done.stdout, re.MULTILINE)
    assert (states[0] in ("pending", "running"), states[-1]) == (True, "completed")
    assert sorted(stand.top.rglob("*")) == before


# ---- The sandbox ------------------------------------------------------------------

OWNED = """mkdir -p .git/hooks
echo 'touch @TOP@/owned; env >>"$HOME/hook-env"; cat' >"$HOME/evil"; chmod +x "$HOME/evil"
for hook in pre-commit commit-msg post-commit post-checkout pre-push reference-transaction; do
    printf '#!/bin/sh\\nsh "%s"' "$HOME/evil" >.git/hooks/$hook; chmod +x .git/hooks/$hook; done
git config core.hooksPath .git/hooks
git config filter.f.clean "sh $HOME/evil"; git config filter.f.smudge "sh $HOME/evil"
git config diff.f.textconv "sh $HOME/evil"; git config diff.external "sh $HOME/evil"
git config core.fsmonitor "$HOME/evil"; git config uploadpack.packObjectsHook "$HOME/evil"
git config core.sshCommand "$HOME/evil"; git config gpg.program "$HOME/evil"
git config commit.gpgSign true; git config core.pager "$HOME/evil"
git config remote.origin.url 'ext::sh @TOP@/evil'
echo '* filter=f diff=f' >.gitattributes
"""


@needs_bwrap
def test_what_the_agent_plants_runs_in_the_sandbox_and_what_it_starts_ends_with_it(
    stand: Stand,
) -> None:
    left = "env -i setsid sleep 3117 &\n"
    stand.agent(left + OWNED.replace("@TOP@", str(stand.top)) + HELLO)
    stand.start(CODEBOT_SANDBOX="bwrap")
    result = stand.done(stand.submit())
    assert not (stand.top / "owned").exists()
    home = Path(result["work_dir"]).parent / "home"
    env = (home / "hook-env").read_text()  # the filter did run, inside
    for secret in (*stand.secrets(), MODEL_KEY):
        assert secret not in env
    assert ".gitattributes" in stand.git("ls-tree", "--name-only", result["branch_name"])
    wait_for(lambda: "sleep 3117" not in sh("ps", "-e", "-o", "args"))


def test_without_a_sandbox_planted_hooks_see_no_secret_either(shared: Stand) -> None:
    shared.agent(OWNED.replace("@TOP@", str(shared.top)) + HELLO)
    task = shared.submit()
    shared.ended(task)
    for path in shared.work.glob("task_*/home/hook-env"):
        env = path.read_text()
        assert not [secret for secret in (*shared.secrets(), MODEL_KEY) if secret in env]


PROBE = r"""
look() { printf '%s: ' "$1"; shift; "$@" >"$HOME/out" 2>&1 && cat "$HOME/out" || echo no; }
{
    look env-file cat @TOP@/here/.env
    look app-key cat @TOP@/keys/app.pem
    look database cat @WORK@/codebot.db
    look work-dir ls -A @WORK@
    look home ls -A @TOP@/home
    look write touch @TOP@/keys/x /usr/x /etc/x
    look environs sh -c 'cat /proc/[0-9]*/environ | tr "\0" "\n"'
    look processes sh -c 'cat /proc/[0-9]*/cmdline | tr "\0" " "'
    look mirror-write touch @WORK@/mirrors/127.0.0.1_*/acme/widget.git/objects/x
    look setns sh -c 'ls /run/* 2>/dev/null'
} >report.txt
"""


@needs_bwrap
def test_in_bwrap_the_agent_sees_its_task_and_nothing_else_of_ours(stand: Stand) -> None:
    (stand.here / ".env").write_text("CODEBOT_API_KEYS=key-in-the-env-file\n")
    (stand.top / "home" / "private").write_text("private")
    stand.start(CODEBOT_SANDBOX="auto", CODEBOT_API_KEYS=None)
    assert re.search(r"^Sandbox: +bwrap", stand.log(), re.MULTILINE)

    def ask(body: dict[str, Any]) -> dict[str, Any]:
        path, key = "/api/tasks/submit", "key-in-the-env-file"
        task = stand.ask("POST", path, body, key=key).json["task_id"]
        at = f"/api/tasks/{task}/status"
        over = ("completed", "failed")
        status = wait_for(lambda: (s := stand.ask("GET", at, key=key).json)["status"] in over and s)
        assert status["status"] == "completed", status
        result: dict[str, Any] = status["result"]
        return result

    first = ask(stand.task())
    probe = PROBE.replace("@TOP@", str(stand.top)).replace("@WORK@", str(stand.work))
    stand.agent(probe + "result")
    result = ask(stand.task("Look around", test_command="test ! -e /proc/1/root/root/x"))
    report = stand.shown(result, "report.txt")
    for secret in (*stand.secrets(), "key-in-the-env-file", "PRIVATE KEY", "private"):
        assert secret not in report
    for look in ("env-file", "app-key", "database", "write", "mirror-write"):
        assert f"{look}: no\n" in f"{report}\n", report
    own, other = (Path(r["work_dir"]).parent.name for r in (result, first))
    assert own in report
    assert other not in report
    assert "serve --port" not in report
    assert MODEL_KEY in report  # its own


@needs_bwrap
def test_objects_of_another_repository_cannot_be_taken(stand: Stand) -> None:
    stand.repository("acme/private", secret="the plans\n")
    stand.start(CODEBOT_SANDBOX="bwrap")
    stand.done(stand.submit(repository_url=stand.url("acme/private")))
    [mirror] = stand.work.glob("mirrors/*/acme/private.git")
    sha = stand.git("rev-parse", "main", name="acme/private")
    stand.agent(
        f"echo {mirror}/objects >>.git/objects/info/alternates\n"
        f"echo {sha} >$(git rev-parse --git-path $(git symbolic-ref HEAD)); result"
    )
    stand.failed(stand.submit(), "agent_failed")
    assert stand.branches() == ["main"]


def test_a_command_line_may_be_the_sandbox(stand: Stand) -> None:
    wrapper = stand.top / "wrapper"
    wrapper.write_text(
        f'#!/bin/sh\necho "$1 $2 $3 $4 $5" >>{stand.top}/wrapped\nshift 3\nexec "$@"\n'
    )
    wrapper.chmod(0o755)
    stand.start(CODEBOT_SANDBOX=f"{wrapper} {{task}} {{objects}} {{other}}")
    result = stand.done(stand.submit())
    [mirror] = stand.work.glob("mirrors/*/acme/widget.git")
    wrapped = (stand.top / "wrapped").read_text().splitlines()
    start = f"{Path(result['work_dir']).parent} {mirror}/objects {{other}} "
    assert all(line.startswith(start) for line in wrapped)
    assert any(line.startswith(f"{start}{stand.top}/claude -p") for line in wrapped)
    assert f"{start}git upload-pack" in wrapped


def test_a_sandbox_that_does_not_run_is_told(stand: Stand) -> None:
    tools = stand.top / "tools"
    tools.mkdir()
    (tools / "bwrap").write_text("#!/bin/sh\necho 'no namespaces here' >&2; exit 1\n")
    (tools / "bwrap").chmod(0o755)
    path = f"{tools}:{os.environ['PATH']}"
    done = stand.run("serve", "--work-dir", str(stand.work), CODEBOT_SANDBOX="bwrap", PATH=path)
    assert (done.returncode, "no namespaces here" in done.stderr) == (2, True)
    stand.start(CODEBOT_SANDBOX="", PATH=path)
    assert re.search(r"^Sandbox: +NONE.*no namespaces here", stand.log(), re.MULTILINE)
    stand.done(stand.submit())


@needs_bwrap
def test_a_key_in_a_folder_that_cannot_be_covered_is_refused(stand: Stand) -> None:
    env = {"GITHUB_APP_PRIVATE_KEY_PATH": "/etc/passwd", "CODEBOT_SANDBOX": "auto"}
    done = stand.run("serve", "--work-dir", str(stand.work), **env)
    assert done.returncode == 2
    assert "/etc: holds .env or a key, and the sandbox cannot cover it" in done.stderr


@as_user
def test_a_work_dir_that_cannot_be_written_is_refused(stand: Stand) -> None:
    stand.work.mkdir(mode=0o500)
    done = stand.run("serve", "--work-dir", str(stand.work / "sub"))
    assert (done.returncode, "cannot be the work-dir" in done.stderr) == (2, True)


# ---- What the auditor is promised -------------------------------------------------


def test_the_file_runs_programs_asks_github_and_moves_states_in_one_place() -> None:
    source = PROGRAM.read_text()
    code = source.replace(ast.get_docstring(ast.parse(source), clean=False) or "", "")
    for promise in ("Popen(", "urlopen(", "SET status"):
        assert code.count(promise) == 1, promise
    assert not re.search(r"\b(os\.system|os\.popen|shell=True|eval\(|exec\(|pickle)", code)


def test_the_file_needs_the_standard_library_only() -> None:
    known = getattr(sys, "stdlib_module_names", None)
    for node in ast.walk(ast.parse(PROGRAM.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)) and known:
            names = (
                [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            )
            assert all(str(name).split(".")[0] in known for name in names)


# ---- Reviews ----------------------------------------------------------------------

CHANGE = "kind change; echo more >>hello.txt; answer Done"
QUESTION = "kind question; answer Because"


def opened(stand: Stand, plan: str, **fields: Any) -> tuple[str, dict[str, Any]]:
    """A task that has its pull request; whoever speaks there meets an agent that does PLAN."""
    result = stand.done(task := stand.submit(**fields))
    stand.logged("its state is noted", 1)  # the first look at a new pull request
    stand.agent(plan)
    return task, result


def push_beside(stand: Stand, branch: str, **files: str) -> str:
    """Someone else pushes a commit on top of the branch."""
    seed = stand.top / "seed" / stand.name
    sh("git", "fetch", "-q", str(stand.top / "hub" / f"{stand.name}.git"), branch, cwd=seed)
    sh("git", "checkout", "-q", "-f", "--detach", "FETCH_HEAD", cwd=seed)
    return stand.commit(branch=branch, **files)


def test_a_webhook_has_to_be_signed_over_its_raw_bytes(shared: Stand) -> None:
    body = '{ "zen":  "Für alle Fälle" }'.encode()
    for signature in ("", "sha256=", "sha256=" + "0" * 64, "sha1=0", "sha256=ü"):
        answer = shared.deliver("ping", body, X_Hub_Signature_256=signature)
        assert (answer.status, "X-Hub-Signature-256" in answer.text) == (401, True), signature
    assert shared.ask("POST", "/webhook", body, key="", X_GitHub_Event="ping").status == 401
    good = {"ping": 200, "push": 200, "installation": 200, "": 200}
    assert {event: shared.deliver(event, body).status for event in good} == good
    refused = shared.deliver(
        "ping", b"payload=%7B%7D", Content_Type="application/x-www-form-urlencoded"
    )
    assert (refused.status, "application/json" in refused.json["message"]) == (415, True)
    assert shared.deliver("ping", b'{"zen": "%s"}' % (b"x" * (3 << 19))).status == 200
    head = b"POST /webhook HTTP/1.1\r\nContent-Length: %d\r\n\r\n"
    assert b" 413 " in shared.raw(head % ((25 << 20) + 1))


def test_the_signature_is_githubs_and_without_a_secret_there_is_no_webhook() -> None:
    def ask(secret: str, given: str, **more: Any) -> None:
        app = codebot.App(codebot.Config(webhook_secret=secret, **more))
        headers = {"x-hub-signature-256": f"sha256={given}"}
        request = codebot.Request("POST", "/webhook", "", headers, b"Hello, World!", True)
        codebot.signed_by_github(app, request)

    documented = "757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"
    ask("It's a Secret to Everybody", documented)
    of_nothing = hmac.new(b"", b"Hello, World!", hashlib.sha256).hexdigest()
    for secret, more in (("", {}), ("It's a Secret to Everybody", {"no_github": True})):
        with pytest.raises(codebot.HTTPError, match="Webhooks are off") as refused:
            ask(secret, of_nothing, **more)
        assert refused.value.status == 404


ODD = [("repository", None), ("repository", "x"), ("repository.id", {}), ("repository.id", 10**30)]
ODD += [("repository.full_name", {}), ("issue", []), ("issue", None), ("issue.number", [1])]
ODD += [("comment", None), ("comment", 5), ("comment.id", "x"), ("comment.id", None)]
ODD += [("comment.id", 10**30), ("comment.id", float("inf")), ("comment.id", float("nan"))]
ODD += [("comment.user", "alice"), ("comment.body", 7), ("comment.body", ["x"])]
ODD += [("comment.in_reply_to_id", ["x"])]


def test_a_payload_of_an_odd_shape_is_refused_and_harms_nothing(shared: Stand) -> None:
    task, _ = opened(shared, QUESTION)
    said = {"id": 1, "body": "Why?", "user": {"login": "alice", "type": "User"}}
    plain = {**shared.event("created", comment=said), "issue": {"number": shared.first}}
    del plain["pull_request"]
    for path, value in ODD:
        payload = json.loads(json.dumps(plain))
        at, _, name = path.rpartition(".")
        (payload[at] if at else payload)[name] = value
        answer = shared.deliver("issue_comment", payload)
        assert (answer.status, "payload" in answer.text) == (400, True), (path, value, answer)
    for body in (b"[]", b"{", b"\xff", b""):
        assert shared.deliver("issue_comment", body).status == 400
    shared.comment("alice", "Why?")
    shared.rounds(task, 1)
    assert shared.log().count("Traceback") == 0


def test_what_is_not_for_codebot_is_ignored(shared: Stand) -> None:
    task, _ = opened(shared, QUESTION)
    said = shared.comment("alice", "Why?", tell=False)
    own, other = BOT, {"login": "robot", "id": 9, "type": "Bot"}
    for more in ({"user": own}, {"user": other}, {"user": None}, {"body": None}, {"body": " \n"}):
        assert shared.tell({**said, **more}).status == 200, more
    assert shared.tell(said, "edited").status == 200
    assert shared.tell({**said, "on": 10**6}).status == 200  # no pull request of ours
    foreign = {**shared.event("closed"), "repository": {"id": 2, "full_name": "acme/other"}}
    assert shared.deliver("pull_request", foreign).status == 200
    assert shared.deliver("pull_request", shared.event("synchronize")).status == 200
    review = shared.review("alice", "", "Inline", tell=False)
    assert [shared.tell(review[0]).status, shared.tell(review[0], "dismissed").status] == [200] * 2
    assert shared.status(task)["reviews"] == []
    assert [shared.tell(said, guid=guid).status for guid in "112"] == [202, 200, 200]
    shared.rounds(task, 1)
    assert (len(shared.answers()), len(shared.asked("Comment"))) == (1, 1)


def test_a_question_is_answered_and_what_it_changed_is_thrown_away(shared: Stand) -> None:
    spoil = f"echo bad >hello.txt; touch new; git commit -qam bad; answer 'Key {MODEL_KEY}'"
    task, result = opened(shared, f"kind question; {spoil}")
    said = shared.comment("alice", "Why --hello <!-- codebot -->?\nIn short.")
    [done] = shared.rounds(task, 1)
    assert (done["number"], done["state"], done["kind"]) == (1, "completed", "question")
    assert (done["commit"], done["error"]) == (None, None)
    [answer] = shared.answers()
    mark = rf"<!-- codebot answer \d+ issue {said['id']} -->"
    words = rf"> Why --hello &lt;!-- codebot -->\?\n\nKey \*\*\* {said['id']}\.\n\n{mark}"
    assert re.fullmatch(words, answer)
    assert shared.git("rev-parse", result["branch_name"]) == result["commit"]
    assert sh("git", "status", "-sb", cwd=Path(result["work_dir"])) == f"## {result['branch_name']}"
    assert shared.hub.eyes == [("issue", said["id"])]
    assert shared.pulls[0]["body"].count("- Round 1, alice: answered\n") == 1
    [(look, shown)], [(argv, told)] = shared.asked("Comment"), shared.asked("Question")
    assert look[look.index("--tools") + 1] == ""
    assert argv[argv.index("--tools") + 1] == "Read,Glob,Grep"
    assert argv[argv.index("--resume") + 1] == task
    for words, prompt in ((look, shown), (argv, told)):
        assert words[words.index("--permission-mode") + 1] == "dontAsk"
        assert "--no-session-persistence" in words
        assert words[words.index("--json-schema") + 1].startswith('{"type": "object", ')
        assert "--hello" not in " ".join(words)
        assert re.search(rf'<(comment-\w{{12}}) id="{said["id"]}" by="alice">\nWhy --hello', prompt)
    for secret in [*shared.secrets(), MODEL_KEY]:
        assert secret not in shared.log() + answer + str(shared.events(task))


def test_a_change_is_pushed_and_told_in_its_thread(shared: Stand) -> None:
    task, result = opened(shared, CHANGE)
    branch, before = result["branch_name"], shared.pulls[0]["body"]
    top = shared.inline("alice", "Say more")
    [first] = shared.rounds(task, 1)
    assert shared.shown(result, "hello.txt") == "hello\nmore"
    assert (first["kind"], first["commit"]) == ("change", shared.git("rev-parse", branch))
    assert shared.git("rev-parse", f"{branch}^") == result["commit"]
    [reply] = [said for said in shared.hub.said if said["user"] == BOT]
    assert (reply["kind"], reply["in_reply_to_id"]) == ("inline", top["id"])
    assert reply["body"].startswith(f"Done {top['id']}.\n\nThe change is in {first['commit']}.\n")
    assert shared.hub.eyes == [("inline", top["id"])]
    line = f"- Round 1, alice: changed in {first['commit']}\n"
    assert shared.pulls[0]["body"].startswith(before + "\n\n### Reviews")
    shared.pulls[0]["body"] = f"Ours.\n{shared.pulls[0]['body']}\nTheirs."
    shared.inline("bob", "Rather less, says Bob", to=top["id"], tell=False)
    last = shared.inline("alice", "And more still", to=top["id"])
    second = shared.rounds(task, 2)[1]
    told = shared.asked("Review comment")[1][1]
    for words in ('line="1">\nOn this part of the diff:\n@@ -0,0', "\nAnd more still\n"):
        assert words in told
    assert re.search(rf'<earlier-\w+ id="{top["id"]}" by="alice" (.|\n)*\nSay more\n', told)
    assert re.search(rf'<earlier-\w+ id="{reply["id"]}" by="codebot itself"', told)
    assert "says Bob" not in told
    assert f"Done {last['id']}." in shared.answers()[1]
    assert shared.hub.said[-1]["in_reply_to_id"] == top["id"]
    body = shared.pulls[0]["body"]
    assert f"{line}- Round 2, alice: changed in {second['commit']}\n" in body
    assert (body[:6], body[-8:], body.count("Round 1,")) == ("Ours.\n", "\nTheirs.", 1)


def test_a_review_is_one_round_in_whatever_order_it_is_told(shared: Stand) -> None:
    task, _ = opened(shared, CHANGE)
    for number, (order, late) in enumerate((((1, 0, 2), ()), ((2,), (0, 1))), 1):
        review = shared.review("bob", "All in all: more", "More here", "And there", tell=False)
        for one in order:
            shared.tell(review[one])
        assert len(shared.rounds(task, number)) == number
        assert [shared.tell(review[one]).status for one in late] == [200] * len(late)
        assert len(shared.asked("Review comment")) == len(shared.asked("Comment")) == number
        answers = shared.answers()[-3:]
        for said in review:
            [own] = [a for a in answers if f" {said['kind']} {said['id']} -->" in a]
            assert f"Done {said['id']}." in own
        assert sum("> All in all: more" in answer for answer in answers) == 1
    assert len(shared.answers()) == 6
    assert len(set(shared.hub.eyes)) == 4  # a review takes none


def test_whatever_the_agent_says_of_a_review_someone_is_answered(shared: Stand) -> None:
    task, _ = opened(shared, "")
    bad = '"structured_output":{"answers":%s,"summary":"In short."},'
    for number, (plan, words) in enumerate(
        [
            ("result yes", codebot.UNCLEAR),
            ("kind anything", codebot.UNCLEAR),
            ("kind unclear 'Which one?'", "Which one?"),
            ("kind question; result 'In plain words'", "In plain words"),
            (f"kind question; more='{bad % '[]'}'; result x", "In short."),
            (f"kind question; more='{bad % 7}'; result x", "In short."),
            (f"kind question; more='{bad % [5]}'; result x", "In short."),
            (f"kind question; more='{bad % '[{}]'}'; result x", "In short."),
            ("kind change; result 'I would rather not'", "rather not\n\nNo file was changed."),
            ("kind change; exit 3", "I could not do this: The agent ended without a result"),
        ],
        1,
    ):
        shared.agent(plan)
        shared.comment("alice", "Hm")
        state = "failed" if "exit" in plan else "completed"
        assert shared.rounds(task, number)[-1]["state"] == state, plan
        assert (len(shared.answers()), words in shared.answers()[-1]) == (number, True), plan
    shared.agent("kind none")
    shared.comment("alice", "Thanks!")
    assert shared.rounds(task, number + 1)[-1]["kind"] == "none"
    assert len(shared.answers()) == number
    assert "Round 11, alice: nothing was asked for" in shared.pulls[0]["body"]


def test_who_may_not_write_and_what_is_not_open_to_us_is_dropped(shared: Stand) -> None:
    task, _ = opened(shared, QUESTION)
    [pull], rights = shared.pulls, shared.hub.rights
    plain, head = json.loads(json.dumps(pull)), pull["head"]

    def lose() -> None:
        del rights["alice"]

    for count, (user, change, words) in enumerate(
        [
            ("carol", lambda: None, "carol may not write to the repository, but read"),
            ("mallory", lambda: None, "mallory may not write to the repository, but none"),
            ("alice", lose, "alice may not write to the repository, but none"),
            ("bob", lambda: pull.update(locked=True), "the conversation is locked"),
            ("bob", lambda: head.update(repo=None), "not of our branch in this repository"),
            ("bob", lambda: head.update(repo={"id": 2}), "not of our branch in this repository"),
            ("bob", lambda: head.update(ref="main"), "not of our branch in this repository"),
            ("bob", shared.hub.said.clear, "what was said was deleted"),
        ],
        2,
    ):
        hold = shared.hub.hold(r"GET .*/pulls/\d+$")
        shared.inline(user, "Delete it all")
        assert hold.reached.wait(20)  # it was taken when all was well
        change()
        hold.go.set()
        shared.logged("is dropped", count)
        assert words in shared.log().rsplit("is dropped", 1)[1], words
        head.update(plain["head"])
        pull["locked"] = False
    assert (shared.hub.eyes, shared.answers(), len(shared.seen("argv"))) == ([], [], 1)
    shared.comment("bob", "Why?")
    assert len(shared.rounds(task, 1)) == 1


def test_who_may_write_is_not_guessed_and_a_round_outlives_its_tasks_row(stand: Stand) -> None:
    limits = {"GITHUB_WAIT": 0.5}
    stand.start(CODEBOT_TASK_RETENTION="1", CODEBOT_REVIEW_WORKERS="2", limits=limits)
    plan = f'[ "$asked" = Task: ] && {{ {HELLO}; exit; }}; {CHANGE.replace(";", "; block;", 1)}'
    task, result = opened(stand, plan)
    stand.inline("alice", "Say more")
    wait_for(stand.reached)
    stand.age(task)
    stand.done(other := stand.submit("Another"))
    stand.forgotten(other)
    assert (stand.status(task)["status"], Path(result["work_dir"]).exists()) == ("completed", True)
    stand.go()
    stand.forgotten(task)
    path = "/repos/acme/widget/collaborators/alice/permission"
    stand.hub.fault(f"GET {path}", (500, b"", {}))
    said = stand.inline("alice", "And more still")
    wait_for(lambda: len(stand.answers()) == 2)
    assert (stand.hub.count(f"GET {path}"), len(stand.asked("Comment"))) == (3, 2)
    assert f"Done {said['id']}." in stand.answers()[1]
    assert stand.shown(result, "hello.txt") == "hello\nmore\nmore"
    stand.pulls[0]["state"] = "closed"
    stand.deliver("pull_request", stand.event("closed"))
    wait_for(lambda: not stand.folders())
    stand.logged("the pull request is closed")
    stand.age(task)
    ours = "Not a pull request that codebot opened"
    wait_for(lambda: stand.tell(said).json["message"] == ours)


def test_rounds_of_one_pull_request_wait_for_each_other_and_for_nothing_else(shared: Stand) -> None:
    first, _ = opened(shared, HELLO)
    second, _ = opened(
        shared,
        f'[ "$asked" = Task: ] && {{ {HELLO}; exit; }}; kind question\n'
        'grep -q "^Slowly$" "$here/stdin" && block; answer Because',
    )
    shared.comment("alice", "Slowly")
    wait_for(shared.reached)
    shared.comment("bob", "And then?")
    dropped = shared.comment("alice", "Never mind")
    shared.comment("alice", "And then?")
    shared.hub.said.remove(dropped)
    assert shared.tell({**dropped, "body": "Mind!"}).status == 200
    shared.comment("bob", "Why?", on=shared.first + 1)
    assert len(shared.rounds(second, 1)) == 1
    shared.done(shared.submit("Another"))
    wait_for(lambda: shared.ask("GET", "/health").json["review_queue_size"] == 3)
    assert "\ncodebot_review_queue_size 3\n" in shared.ask("GET", "/metrics").text
    assert [r["state"] for r in shared.status(first)["reviews"]] == ["running", *["pending"] * 3]
    shared.go()
    wait_for(lambda: len(shared.answers()) == 3)
    assert [answer.split("\n")[0] for answer in shared.answers()] == [
        "> Slowly",
        *["> And then?"] * 2,
    ]
    assert len(shared.rounds(first, 3)) == 3
    bobs, alices = (told for _, told in shared.asked("Question")[-2:])
    assert ("Slowly" in bobs, "Slowly" in alices) == (False, True)
    assert "was deleted" in shared.log()


def test_closed_and_opened_again_it_is_gone_on_with_from_nothing(shared: Stand) -> None:
    task, result = opened(shared, CHANGE)
    folder, [pull] = Path(result["work_dir"]).parent, shared.pulls

    def becomes(action: str, **state: Any) -> None:
        pull.update(state)
        wanted = "merged" if pull["merged"] else pull["state"]
        assert shared.deliver("pull_request", shared.event(action)).status == 202
        wait_for(lambda: shared.status(task)["result"]["pr_state"] == wanted)

    becomes("closed", state="closed")
    wait_for(lambda: not folder.exists())
    shared.comment("alice", "Too late")
    shared.logged("the pull request is closed", 2)
    becomes("reopened", state="open")
    shared.logged("its state is noted", 2)  # by then it was asked what was said meanwhile
    lost = (
        'case "$*" in *"--resume $old"*) echo "No conversation found with session ID"; exit 1; esac'
    )
    shared.agent(f"kind change; old={task}; {lost}; echo more >>hello.txt; answer Done")
    for number in (1, 2):
        shared.comment("alice", "Say more")
        assert shared.rounds(task, number)[-1]["state"] == "completed"
    assert shared.shown(result, "hello.txt") == "hello\nmore\nmore"
    (lost_argv, _), (fresh, told), (resumed, _) = shared.asked("Review comment")
    assert lost_argv[lost_argv.index("--resume") + 1] == task
    session = fresh[fresh.index("--session-id") + 1]
    assert session == resumed[resumed.index("--resume") + 1] != task
    assert "<task>\nSay hello\n</task>\nIts diff:\ndiff --git a/hello.txt" in told
    becomes("closed", state="closed", merged=True)
    wait_for(lambda: not folder.exists())
    assert len(shared.answers()) == 2


def test_closing_ends_the_round_that_is_at_work(shared: Stand) -> None:
    task, result = opened(shared, CHANGE.replace(";", "; block;", 1))
    shared.comment("alice", "Say more")
    wait_for(shared.reached)
    shared.pulls[0]["state"] = "closed"
    shared.deliver("pull_request", shared.event("closed"))
    wait_for(lambda: not Path(result["work_dir"]).parent.exists())
    wait_for(lambda: not shared.status(task)["reviews"])
    wait_for(shared.only_the_server_is_left)
    assert (shared.answers(), shared.git("rev-parse", result["branch_name"])) == (
        [],
        result["commit"],
    )


def test_what_is_done_waits_for_a_github_that_is_down_at_the_push(stand: Stand) -> None:
    stand.start(CODEBOT_TASK_RETENTION="1", limits={"GITHUB_WAIT": 0.5})
    _, result = opened(stand, CHANGE)
    hold = stand.hub.hold("GET .*git-receive-pack")
    stand.comment("alice", "Say more")
    assert hold.reached.wait(20)
    stand.hub.tokens.clear()
    stand.hub.fault("POST /app/installations", (503, {}))
    hold.go.set()
    stand.logged("running -> pending")
    wait_for(lambda: stand.answers())
    head = stand.git("rev-parse", result["branch_name"])
    assert f"The change is in {head}." in stand.answers()[0]
    assert len(stand.asked("Review comment")) == 1


def test_a_change_is_tested_and_pushed_only_when_it_passes(shared: Stand) -> None:
    task, result = opened(
        shared, "", test_command="echo it is $(cat hello.txt); grep -q hello hello.txt"
    )
    mended = '[ "$asked" = "Test failure:" ] && { echo hello you >hello.txt; result; exit; }'
    shared.agent(f"kind change; {mended}; echo bad >hello.txt; answer Done")
    shared.inline("alice", "Say you")
    assert shared.rounds(task, 1)[0]["commit"] == shared.git("rev-parse", result["branch_name"])
    assert shared.shown(result, "hello.txt") == "hello you"
    [(argv, told)] = shared.asked("Test failure")
    assert argv[argv.index("--resume") + 1] == task
    assert "<output>\nit is bad\n" in told
    shared.agent("kind change; echo bad >hello.txt; answer Done")
    shared.inline("alice", "Say bad")
    failed = shared.rounds(task, 2)[1]
    assert (failed["state"], failed["commit"]) == ("failed", None)
    assert failed["error"] == "The tests still fail, with code 1: it is bad"
    assert f"I could not do this: {failed['error']}" in shared.answers()[1]
    assert "The change is in" not in shared.answers()[1]
    assert shared.shown(result, "hello.txt") == "hello you"
    assert "- Round 2, alice: failed (tests_failed)\n" in shared.pulls[0]["body"]


def test_what_others_pushed_meanwhile_is_built_upon(shared: Stand) -> None:
    task, result = opened(shared, CHANGE, test_command="cat hello.txt theirs; true")
    branch, bobs = result["branch_name"], itertools.count(1)

    def push() -> None:
        push_beside(shared, branch, theirs=f"Bob was here {next(bobs)}\n")

    shared.hub.fault("GET .*service=git-receive-pack", push)
    shared.inline("alice", "Say more")
    [done] = shared.rounds(task, 1)
    assert done["commit"] == shared.git("rev-parse", branch)
    said = shared.git("log", "-2", "--format=%s", branch).split("\n")
    assert said == ["Answer the review of Say hello", "Change theirs"]
    assert shared.shown(result, "hello.txt") == "hello\nmore"
    assert shared.events(task).count("test: Bob was here 1") == 1  # it was tested as it is pushed
    assert f"The change is in {done['commit']}." in shared.answers()[0]

    shared.hub.fault("POST .*/git-receive-pack", push, push)
    shared.inline("alice", "Say still more")
    failed = shared.rounds(task, 2)[1]
    assert (failed["state"], failed["commit"]) == ("failed", None)
    assert "I could not do this: Failed to push" in shared.answers()[1]
    assert shared.shown(result, "theirs") == "Bob was here 3"

    conflict = {"hello.txt": "goodbye\n"}
    shared.hub.fault(
        "GET .*service=git-receive-pack", lambda: push_beside(shared, branch, **conflict)
    )
    shared.inline("alice", "Say still more")
    assert shared.rounds(task, 3)[2]["commit"] is None
    told = re.search(
        r"conflicts with theirs: hello.txt. It is kept as branch (\S+)", shared.answers()[2]
    )
    assert told
    assert shared.shown(result, "hello.txt") == "goodbye"
    kept = sh("git", "show", f"{told[1]}:hello.txt", cwd=Path(result["work_dir"]))
    assert kept == "hello\nmore\nmore"


def test_a_push_that_worked_is_none_that_others_undid_by_pushing_on_top(stand: Stand) -> None:
    stand.start(CODEBOT_SANDBOX="auto")
    task, result = opened(stand, CHANGE)

    def on_top() -> None:
        push_beside(stand, result["branch_name"], theirs="Bob was here\n")

    stand.hub.fault("POST .*/git-receive-pack", on_top, when="after")
    stand.inline("alice", "Say more")
    [done] = stand.rounds(task, 1)
    assert done["commit"] == stand.git("rev-parse", f"{result['branch_name']}^")
    assert f"The change is in {done['commit']}." in stand.answers()[0]


CUTS = {  # where a review is cut off
    "taken": ("GET /repos/acme/widget/pulls/1$", "before"),
    "push": ("POST .*/git-receive-pack", "before"),
    "pushed": ("POST .*/git-receive-pack", "after"),
    "answer": ("POST .*/replies", "before"),
    "answered": ("POST .*/replies", "after"),
    "question": ("POST .*/replies", "after"),
}


def test_killed_at_any_step_a_review_has_one_push_and_one_answer(stand: Stand) -> None:
    task, result = opened(stand, CHANGE)
    steps = ["look", "agent", *CUTS]
    plans = dict.fromkeys(steps, CHANGE) | {"look": f"block; {CHANGE}", "question": QUESTION}
    plans["agent"] = CHANGE.replace(";", "; block;", 1)
    for number, step in enumerate(steps, 1):
        stand.fresh()
        stand.agent(plans[step])
        reached = stand.hub.hold(*CUTS[step]).reached.is_set if step in CUTS else stand.reached
        said = stand.inline("alice", "Say more")
        wait_for(reached)
        stand.stop() if step == "look" else stand.kill()
        stand.go()
        stand.hub.release()
        stand.start()
        assert stand.rounds(task, number)[-1]["state"] == "completed", step
        assert len(stand.answers()) == number, step
        assert f" {said['id']}." in stand.answers()[-1], step
        assert stand.pulls[0]["body"].count("- Round ") == number, step
    changes = stand.git("log", "--format=%s", f"main..{result['branch_name']}").split("\n")
    assert changes == ["Answer the review of Say hello"] * (len(steps) - 1) + ["Say hello"]
    assert stand.shown(result, "hello.txt").count("more") == len(steps) - 1


def test_a_review_that_the_server_dies_of_is_given_up_and_told(stand: Stand) -> None:
    task, _ = opened(stand, "block")
    stand.inline("alice", "Say more")
    wait_for(stand.reached)
    stand.kill()
    stand.start(limits={"INTERRUPTIONS": 1})
    [failed] = stand.rounds(task, 1)
    assert (failed["state"], failed["error"] in stand.answers()[0]) == ("failed", True)
    assert "failed again and again" in failed["error"]


def test_an_answer_is_posted_once_though_githubs_word_of_it_was_lost(shared: Stand) -> None:
    task, _ = opened(shared, QUESTION)
    shared.hub.fault(r"POST .*/issues/\d+/comments", lambda: None, when="after")
    shared.review("alice", "Why?")
    assert shared.rounds(task, 1)[0]["state"] == "completed"
    assert (len(shared.answers()), shared.hub.count(r"POST .*/issues/\d+/comments")) == (1, 1)


def test_what_goes_wrong_in_a_round_is_told_and_harms_no_other(shared: Stand) -> None:
    task, result = opened(shared, QUESTION)
    no = (403, {"message": "Resource not accessible by integration"})
    shared.hub.fault(r"PATCH .*/pulls/\d+$", no)
    shared.inline("alice", "Why?")
    assert shared.rounds(task, 1)[0]["state"] == "completed"
    assert "is left as it is: 403 Resource not" in shared.log()
    shared.hub.fault("GET .*/permission", no)  # for good: who may write is not guessed
    shared.inline("alice", "Why?")
    shared.logged("is dropped: alice may not write to the repository, but 403 Resource not")
    assert (len(shared.rounds(task, 1)), len(shared.answers())) == (1, 1)
    shared.hub.fault("POST .*/replies", no)
    shared.inline("alice", "Why?")
    failed = shared.rounds(task, 2)[1]
    assert (failed["state"], failed["error"][-13:]) == ("failed", "y integration")
    shared.agent("kind change; rm -rf .git; echo x >x; answer Done")
    shared.inline("alice", "Say more")
    assert f"I could not do this: {shared.rounds(task, 3)[2]['error']}" in shared.answers()[1]
    shared.agent(CHANGE)

    def undo() -> None:
        shared.git("update-ref", f"refs/heads/{result['branch_name']}", result["commit"])

    asked = dict.fromkeys(("for the work", "before the push"), lambda: None).values()
    shared.hub.fault("GET .*service=git-upload-pack", *asked, undo)  # after the push
    shared.inline("alice", "Say more")
    assert shared.rounds(task, 4)[3]["commit"] is None
    assert "was pushed, but it is not on the branch any more" in shared.answers()[2]
    shared.hub.fault("POST .*/git-receive-pack", shared.hub.said.clear)
    shared.inline("alice", "Say more")
    done = shared.rounds(task, 5)[4]
    assert (done["state"], done["commit"]) == ("completed", shared.git("rev-parse", done["commit"]))
    assert (shared.answers(), "no answer to inline" in shared.log()) == ([], True)


def test_reviews_follow_a_renamed_repository_if_it_is_allowed(stand: Stand) -> None:
    task, _ = opened(stand, CHANGE)
    rename(stand)
    stand.inline("alice", "Say more")
    [done] = stand.rounds(task, 1)
    assert done["commit"] in stand.git("branch", "-v", "--no-abbrev", name="acme/gadget")
    stand.kill()
    stand.start(CODEBOT_ALLOWED_REPOSITORIES="acme/w*")
    stand.inline("alice", "Say more")
    stand.logged("The repository is acme/gadget, which is not allowed")
    assert len(stand.rounds(task, 1)) == 1


def test_what_was_said_while_it_was_down_is_found_at_the_start(stand: Stand) -> None:
    task, _ = opened(stand, QUESTION)
    stand.comment("alice", "Known")
    stand.rounds(task, 1)
    stand.kill()
    stand.hub.page = 2
    said = [stand.comment("alice", f"Number {n}", tell=False) for n in range(3)]
    said += [stand.inline("bob", f"Number {n}", tell=False) for n in range(3)]
    said += stand.review("alice", "All in all", "and here", tell=False)
    said += stand.review("bob", "Only this", tell=False)
    stand.start()
    stand.rounds(task, 9)
    for one in said:
        [answer] = [a for a in stand.answers() if f"{one['kind']} {one['id']} -->" in a]
        assert f"Because {one['id']}." in answer
    assert len(stand.answers()) == len(said) + 1
    assert stand.tell(said[0]).status == 200


def test_polling_finds_what_no_webhook_tells(stand: Stand) -> None:
    stand.start(
        "--enable-polling",
        "--poll-interval",
        "1",
        GITHUB_WEBHOOK_SECRET=None,
        limits={"GITHUB_WAIT": 0.5},
    )
    task, _ = opened(stand, QUESTION)
    comments = "GET /repos/acme/widget/issues/1/comments"
    assert stand.deliver("ping", {}).status == 404
    stand.hub.fault(comments, (503, b"", {}))
    stand.review("alice", "Why?", tell=False)
    stand.logged("of acme/widget#1 is put back: 503")  # the reviews were read then, but not kept
    stand.rounds(task, 1)
    stand.pulls[0]["state"] = "closed"
    wait_for(lambda: stand.hub.unchanged)  # nobody said anything on a line
    wait_for(lambda: stand.status(task)["result"]["pr_state"] == "closed")
    assert len(stand.answers()) == len(stand.status(task)["reviews"]) == 1
    stand.pulls[0]["state"] = "open"
    stand.comment("alice", "And now?", tell=False)
    stand.rounds(task, 2)


FIRST_SCHEMA = """CREATE TABLE tasks(
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, status TEXT NOT NULL,
    submitted_at TEXT NOT NULL, started_at TEXT, completed_at TEXT, repository_url TEXT NOT NULL,
    description TEXT NOT NULL, ticket_id TEXT, ticket_summary TEXT, test_command TEXT,
    base_branch TEXT, idempotency_key TEXT, body_hash TEXT, phase TEXT,
    interruptions INTEGER NOT NULL DEFAULT 0, cancelled INTEGER NOT NULL DEFAULT 0,
    folder TEXT, mirror TEXT, branch TEXT, base_name TEXT, head_commit TEXT, outcome TEXT,
    result TEXT, error TEXT, reason TEXT);
CREATE TABLE events(seq INTEGER PRIMARY KEY AUTOINCREMENT, task_id TEXT NOT NULL,
    time TEXT NOT NULL, source TEXT NOT NULL, message TEXT NOT NULL);
CREATE INDEX tasks_by_status ON tasks(status, seq);
CREATE UNIQUE INDEX tasks_by_key ON tasks(idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX events_by_task ON events(task_id, seq);
CREATE TABLE totals(name TEXT PRIMARY KEY, value REAL NOT NULL);
PRAGMA user_version=1;"""


def test_a_database_from_before_reviews_is_taken_over(stand: Stand) -> None:
    stand.work.mkdir(mode=0o700)
    old = ("id, status, submitted_at, repository_url, description", codebot.now_text())
    with stand.database() as db:
        db.executescript(FIRST_SCHEMA)
        for task, status in (("a", "pending"), ("b", "failed")):
            row = (task, status, old[1], stand.url(), "Say hello")
            db.execute(f"INSERT INTO tasks({old[0]}) VALUES(?, ?, ?, ?, ?)", row)
    stand.start()
    stand.done("a")
    assert stand.status("b")["status"] == "failed"
    stand.logged("its state is noted")
    stand.agent(QUESTION)
    stand.comment("alice", "Why?")
    assert len(stand.rounds("a", 1)) == 1


# ---- The page ---------------------------------------------------------------------


def test_the_page_is_one_answer_that_allows_only_its_own_script_and_style(shared: Stand) -> None:
    answer = shared.ask("GET", "/", key="")
    assert (answer.status, answer.text) == (200, codebot.PAGE)
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in answer.headers[CSP].split("; "))
    for tag in ("script", "style"):
        [text] = re.findall(f"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy.pop(f"{tag}-src") == f"'sha256-{digest}'"
    assert policy.pop("connect-src") == "'self'"
    assert policy.pop("require-trusted-types-for") == "'script'"
    names = {"default-src", "base-uri", "form-action", "frame-ancestors", "trusted-types"}
    assert policy == dict.fromkeys(names, "'none'")
    wanted = {"X-Frame-Options": "DENY", "X-Content-Type-Options": "nosniff"}
    for name, text in {**wanted, "Referrer-Policy": "no-referrer"}.items():
        assert answer.headers[name] == text
    head = shared.ask("HEAD", "/", key="")
    assert (head.status, head.text, head.headers[CSP]) == (200, "", answer.headers[CSP])


def test_the_page_is_short_and_has_nothing_that_runs_text() -> None:
    lines = codebot.PAGE.splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) < 100
    assert not re.search(r"\ssrc=|url\(|@import|//[a-z]+\.[a-z]", codebot.PAGE)
    assert not re.search(r"<[^>]*\s(on[a-z]+|style)\s*=", codebot.PAGE.partition("<script>")[0])
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval"):
        assert word not in codebot.PAGE
    assert not re.search(
        r"\bFunction\(|localStorage|cookie|set(Timeout|Interval)\(['\"`]", codebot.PAGE
    )


class Browser:
    """Chromium without a window, told what to do through a pipe: the DevTools protocol, which
    is JSON with a NUL after each message.  `open` gives a page of its own, with fresh storage."""

    def __init__(self, program: str, top: Path) -> None:
        take, self.out = os.pipe()
        self.into, give = os.pipe()
        move = "import fcntl, os, sys; ends = [fcntl.fcntl(int(n), 0, 10) for n in sys.argv[1:3]]; "
        move += "os.dup2(ends[0], 3); os.dup2(ends[1], 4); os.execvp(sys.argv[3], sys.argv[3:])"
        argv = [sys.executable, "-c", move, str(take), str(give), program, "--headless=new"]
        argv += ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        argv += [
            "--remote-debugging-pipe",
            f"--user-data-dir={top}",
            "--disable-background-networking",
        ]
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        env = {"PATH": os.environ["PATH"], "HOME": str(top), "LC_ALL": "C.UTF-8", "TZ": "UTC"}
        self.process = subprocess.Popen(
            argv, pass_fds=(take, give), env=env, start_new_session=True, **quiet
        )
        for fd in (take, give):
            os.close(fd)
        self.data, self.number, self.page = b"", 0, {}
        self.events: list[dict[str, Any]] = []

    def close(self) -> None:
        with contextlib.suppress(OSError, AssertionError):
            self.call("Browser.close")
            self.process.wait(5)
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.out)
        os.close(self.into)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        scope = self.page if not method.startswith(("Target.", "Browser.")) else {}
        message = {"id": self.number, "method": method, "params": params, **scope}
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.read()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def read(self) -> Any:
        while b"\0" not in self.data:
            assert select.select([self.into], [], [], 20)[0], "the browser says nothing"
            more = os.read(self.into, 1 << 20)
            assert more, "the browser has ended"
            self.data += more
        message, _, self.data = self.data.partition(b"\0")
        return json.loads(message)

    def shut(self) -> None:
        self.call("Page.close")
        self.page, self.events = {}, []

    def open(self, url: str) -> None:
        context = self.call("Target.createBrowserContext", disposeOnDetach=True)
        target = self.call("Target.createTarget", url="about:blank", **context)
        attached = self.call("Target.attachToTarget", flatten=True, targetId=target["targetId"])
        self.page = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        hurry = "{ const wait = setTimeout; setTimeout = (act, ms, ...more) => "
        hurry += "wait(act, ms / 10, ...more); }"  # the page asks ten times as often
        self.call("Page.addScriptToEvaluateOnNewDocument", source=hurry)
        self.resize(1280, 900)
        self.go(url)

    def go(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        wait_for(
            lambda: self.js("document.readyState === 'complete' && location.href !== 'about:blank'")
        )

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def colours(self, scheme: str) -> None:
        wish = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=wish)

    def js(self, expression: str) -> Any:
        how = {"returnByValue": True, "awaitPromise": True, "userGesture": True}
        answer = self.call("Runtime.evaluate", expression=expression, **how)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def sees(self, text: str, seconds: float = 20) -> None:
        """Wait until TEXT is among what a person sees."""
        body = "(document.body || {innerText: ''}).innerText"  # none while it is loaded
        shown = f"{body}.replace(/\\s+/g, ' ').includes({json.dumps(text)})"
        try:
            wait_for(lambda: self.js(shown), seconds)
        except AssertionError:
            raise AssertionError(f"{text!r} is not in {self.js(body)}") from None

    def look_up(self) -> None:
        """What happens when a person comes back to the tab."""
        self.js("document.dispatchEvent(new Event('visibilitychange'))")

    def press(self, key: str, shift: bool = False) -> None:
        codes = {"Tab": 9, "Enter": 13, "End": 35, "ArrowDown": 40, "PageUp": 33}
        how = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key], "modifiers": 8 * shift}
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **how, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **how)

    def write(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def named(self, role: str, name: str) -> str:
        """An expression for the visible element of a role and name, as a person finds it."""
        kinds = {"button": "button", "link": "a", "field": "input, textarea, select"}
        return (
            f"[...document.querySelectorAll({json.dumps(kinds[role])})].find((e) => "
            f"e.checkVisibility() && (e.labels && e.labels[0] || e).innerText.trim()"
            f".includes({json.dumps(name)}))"
        )

    def click(self, role: str, name: str) -> None:
        found = self.named(role, name)
        wait_for(lambda: self.js(f"Boolean({found})"))
        x, y = self.js(
            f"(() => {{ const e = {found}; e.scrollIntoView({{block: 'center'}}); "
            "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def fill(self, name: str, text: str) -> None:
        self.click("field", name)
        self.js("document.activeElement.select && document.activeElement.select()")
        self.write(text)

    def enter(self, key: str) -> None:
        self.fill("Key", key)
        self.press("Enter")

    def focused(self) -> str:
        """The name of what has the keyboard's focus."""
        name = "(e => (e.labels && e.labels[0] || e).innerText.trim())(document.activeElement)"
        return str(self.js(name))

    def tab_to(self, name: str) -> None:
        for _ in range(40):
            self.press("Tab")
            if name in self.focused():
                return
        raise AssertionError(f"no Tab leads to {name!r}")

    def picture(self, path: str) -> None:
        shot = self.call("Page.captureScreenshot", format="png")
        Path(path).write_bytes(base64.b64decode(shot["data"]))

    def errors(self) -> list[Any]:
        """What the browser complained of: scripts that failed, a policy that was broken."""
        bad = ("Runtime.exceptionThrown", "Log.entryAdded")
        found = [event["params"] for event in self.events if event["method"] in bad]
        return [e for e in found if e.get("entry", {}).get("source") != "network"]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Any:
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip("there is no chromium on PATH")
    browser = Browser(program, tmp_path_factory.mktemp("chromium"))
    try:
        try:
            browser.call("Browser.getVersion")
        except (AssertionError, OSError) as error:
            pytest.skip(f"chromium does not start here: {error}")
        yield browser
    finally:
        browser.close()


@pytest.fixture
def browser(stand: Stand, chromium: Browser) -> Any:
    """A page of the stand's server, before a key was given."""
    stand.agent(PAGE_AGENT)
    chromium.open("http://{}:{}/".format(*stand.address()))
    yield chromium
    chromium.shut()


MARKUP = "<img src=x onerror=alert(1)>"
PAGE_AGENT = rf"""case $(cat "$here/stdin") in
*wait*) say 'I read {MARKUP}'; block;;
*fail*) say 'I give up.'; exit 1;;
esac
say 'I wrote it.'; {HELLO}"""


def test_a_wrong_key_is_told_by_the_page_and_a_right_one_stays_in_the_tab(
    stand: Stand, browser: Browser
) -> None:
    browser.go(f"{browser.js('location.origin')}/#task=none")
    for wrong in ("no such key", "schlüssel"):
        browser.enter(wrong)
        browser.sees("The server refuses this key")
        assert browser.js("sessionStorage.length") == 0
    browser.enter(KEY)
    browser.sees("There is no task 'none'")
    browser.call("Page.reload")
    browser.sees("There is no task 'none'")
    assert browser.js("Object.values(sessionStorage)") == [KEY]
    assert browser.js("localStorage.length + document.cookie.length") == 0
    assert KEY not in browser.js("location.href + document.documentElement.outerHTML")
    asked = [e["params"]["request"] for e in browser.events if e["method"].endswith("BeSent")]
    assert not any(KEY in request["url"] for request in asked)
    browser.click("button", "Forget key")
    browser.sees("API key")
    assert browser.js("sessionStorage.length") == 0
    assert browser.errors() == []


def test_a_task_is_submitted_watched_and_opened_on_the_page(stand: Stand, browser: Browser) -> None:
    browser.enter(KEY)
    browser.click("button", "Submit")
    browser.sees("repository_url: is missing")
    assert browser.focused().startswith("Repository")
    assert browser.js("document.activeElement.getAttribute('aria-invalid')") == "true"
    describes = "document.getElementById(document.activeElement.getAttribute('aria-describedby'))"
    assert browser.js(f"{describes}.innerText") == "repository_url: is missing"
    browser.fill("Repository", stand.url())
    browser.fill("Description", f"Say {MARKUP}, then wait")
    browser.fill("Base branch", "no branch")
    browser.click("button", "Submit")
    browser.sees("base_branch: 'no branch' is no name of a branch")
    browser.fill("Base branch", "main")
    browser.click("button", "Submit")
    browser.sees(f"agent I read {MARKUP}")  # while it runs
    browser.sees("running agent")
    assert not (stand.top / "go").exists()
    assert browser.focused() == f"Say {MARKUP}, then wait"
    stand.go()
    browser.sees("codebot Completed")
    browser.sees("Open the pull request")
    [pull] = stand.pulls
    browser.sees(pull["head"]["ref"])
    link = browser.named("link", "Open the pull request")
    assert browser.js(f"[{link}.href, {link}.rel]") == [pull["html_url"], "noopener noreferrer"]
    assert browser.js("document.images.length") == 0
    review = {"number": 1, "state": "answered", "kind": "change", "commit": None, "more": MARKUP}
    put = f"shown.now.reviews = [{json.dumps(review)}]; draw(); the.facts.innerText"
    assert "answered, change" in browser.js(put)  # at once: what is asked next replaces it
    browser.call("Page.reload")
    browser.sees("codebot Completed")
    assert browser.errors() == []


def test_a_task_is_cancelled_retried_and_filtered_on_the_page(
    stand: Stand, browser: Browser
) -> None:
    stand.done(stand.submit("The good one"))
    failed = stand.submit("The one to fail")
    stand.failed(failed, "agent_failed")
    task = stand.submit("The one to wait")
    wait_for(stand.reached)
    browser.enter(KEY)
    browser.click("link", "The one to wait")
    browser.click("button", "Cancel")
    browser.sees("cancelled: ")
    browser.sees("Retry at will.")
    assert browser.js("document.activeElement.id") == "name"  # its button is hidden now
    assert stand.status(task)["reason"] == "cancelled"
    stand.go()
    browser.click("button", "Retry")
    wait_for(lambda: browser.js("location.hash") != f"#task={task}")
    browser.sees("codebot Completed")
    browser.js(f"location.hash = 'task={failed}'")
    browser.sees("agent_failed: The agent ended without a result")
    browser.sees("See the log; a retry may do.")
    assert "The good one" in browser.js("document.getElementById('list').innerText")
    browser.click("field", "Show")
    browser.js("document.activeElement.value = 'failed'")
    browser.js("document.activeElement.dispatchEvent(new Event('change'))")
    browser.sees("2 of 4")
    assert "The good one" not in browser.js("document.getElementById('list').innerText")
    assert browser.errors() == []


def test_the_page_holds_a_thousand_tasks_and_ten_thousand_events(
    stand: Stand, browser: Browser
) -> None:
    stand.done(task := stand.submit("The last one"))
    fill_database(stand, task, tasks=1200, events=10_000)
    browser.enter(KEY)
    browser.sees("1000 of 1000")
    assert browser.js("document.querySelectorAll('#rows li').length") == 1000
    browser.js("window.first = document.querySelector('#rows li'); first.firstChild.focus()")
    stand.submit("A new one")
    browser.look_up()
    browser.sees("A new one")
    assert browser.js("document.activeElement === first.firstChild")
    clock = "(() => { const t = performance.now(); draw(); return performance.now() - t; })()"
    assert min(browser.js(clock) for _ in range(3)) < 100  # milliseconds
    browser.js(f"location.hash = 'task={task}'")
    browser.sees("event 9999")
    at_end = "the.log.scrollTop + the.log.clientHeight > the.log.scrollHeight - 5"
    assert browser.js(at_end)
    assert browser.js("the.log.children.length") > 10_000
    browser.js("the.log.scrollTop = 50")
    browser.js(
        r"addEvents(shown, 'id: 1\ndata: {\"time\": \"2025-01-01\", \"message\": \"more\"}\n\n')"
    )
    assert browser.js("[the.log.scrollTop, the.log.lastChild.innerText.slice(-4)]") == [50, "more"]
    asked = [
        e["params"]["request"]["url"] for e in browser.events if e["method"].endswith("BeSent")
    ]
    assert sum("limit=1000" in url for url in asked) == 1
    assert browser.errors() == []


def fill_database(stand: Stand, task: str, tasks: int, events: int) -> None:
    """Put failed tasks below TASK, and more events behind its own."""
    with stand.database() as db:
        db.execute("UPDATE tasks SET seq = 5000")
        add = "INSERT INTO tasks(seq, id, status, submitted_at, completed_at, repository_url, "
        add += "description, error, reason) VALUES(?, ?, 'failed', ?, ?, ?, ?, 'x', 'internal')"
        now = codebot.now_text()
        rows = [(n + 1, f"old-{n}", now, now, stand.url(), f"Old {n}") for n in range(tasks)]
        db.executemany(add, rows)
        more = "INSERT INTO events(task_id, time, source, message) VALUES(?, ?, 'agent', ?)"
        db.executemany(more, [(task, now, f"event {n}") for n in range(events)])


def test_the_page_tells_that_the_server_is_gone_and_goes_on_where_it_was(
    stand: Stand, browser: Browser
) -> None:
    task = stand.submit("wait")
    wait_for(stand.reached)
    browser.enter(KEY)
    browser.js(f"location.hash = 'task={task}'")
    browser.sees("agent I read")
    stand.stop()
    browser.sees("The server does not answer; it is asked again")
    stand.go()
    stand.start("--port", str(stand.port))
    browser.look_up()
    browser.sees("codebot Completed")
    assert browser.js("the.log.children.length") == len(stand.events(task))
    assert browser.errors() == []


def test_the_page_is_used_by_keyboard_alone(stand: Stand, browser: Browser) -> None:
    for name, text in (("Key", KEY), ("Open", "")):
        browser.tab_to(name)
        browser.write(text)
    browser.press("Enter")
    browser.sees("0 of 0")
    browser.tab_to("New task")
    browser.press("Enter")
    for name, text in (("Repository", stand.url()), ("Description", "Let it fail"), ("Submit", "")):
        browser.tab_to(name)
        browser.write(text)
    browser.press("Enter")
    browser.sees("agent_failed: ")
    browser.sees("codebot Failed")
    assert browser.focused() == "Let it fail"
    browser.tab_to("Retry")
    browser.press("Enter")
    wait_for(lambda: stand.ask("GET", "/api/tasks").json["count"] == 2)
    browser.sees("2 of 2")


@pytest.mark.skipif("CODEBOT_AXE" not in os.environ, reason="it names axe.min.js of npm's axe-core")
def test_axe_finds_nothing_to_mend_on_the_page(stand: Stand, browser: Browser) -> None:
    axe = Path(os.environ["CODEBOT_AXE"]).read_text()

    def look(where: str) -> None:
        for scheme, width in itertools.product(("light", "dark"), (1280, 360)):
            browser.colours(scheme)
            browser.resize(width, 800)
            browser.js(f"{axe};0")
            told = "[r.violations.map((v) => `${v.id}: ${v.nodes[0].html}`), r.passes.length]"
            found, passed = browser.js(f"axe.run().then((r) => {told})")
            assert (found, passed > 10) == ([], True), (where, scheme, width)
            assert browser.js("document.documentElement.scrollWidth <= innerWidth"), (where, width)
        browser.resize(1280, 900)

    look("key")
    browser.enter("wrong")
    browser.sees("refuses")
    look("wrong key")
    stand.done(done := stand.submit("The good one", test_command="true"))
    stand.failed(failed := stand.submit("fail"), "agent_failed")
    waits = stand.submit("wait")
    wait_for(stand.reached)
    browser.enter(KEY)
    browser.sees("The good one")
    browser.click("button", "Submit")
    browser.sees("is missing")
    look("list and form")
    for task, words in ((done, "codebot Completed"), (failed, "Failed (agent"), (waits, "I read")):
        browser.js(f"location.hash = 'task={task}'")
        browser.sees(words)
        look(words)


# ---- What went wrong once ---------------------------------------------------------


WORDS = [
    "echo x >x; result 'Added the /login route.'",
    r"echo x >x; result 'half a letter: \ud800'",
    "echo x >x; result | sed 's/0.25/NaN/'",
    "echo x >x; result | sed 's/0.25/-1e300/'",
]


def test_no_word_of_the_agents_about_a_success_makes_it_a_failure(shared: Stand) -> None:
    for task, plan in zip(shared.submit_each(WORDS), WORDS):
        assert shared.done(task)["cost_usd"] in (0.25, 0.0), plan


def test_a_request_hidden_behind_a_refused_one_is_not_taken(shared: Stand) -> None:
    before = shared.ask("GET", "/api/tasks").json
    body = json.dumps(shared.task()).encode()
    hidden = b"POST /api/tasks/submit HTTP/1.1\r\nX-API-Key: %s\r\nContent-Length: %d\r\n\r\n%s"
    inner = hidden % (KEY.encode(), len(body), body)
    answer = shared.raw(b"POST /x HTTP/1.1\r\nContent-Length: 1048577\r\n\r\n" + inner)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert shared.ask("GET", "/api/tasks").json == before


def test_a_length_is_asked_for_only_where_a_body_is_read(shared: Stand) -> None:
    head = f"HTTP/1.1\r\nX-API-Key: {KEY}\r\nConnection: close\r\n\r\n".encode()
    assert b" 411 " in shared.raw(b"POST /api/tasks/submit " + head)
    assert b" 405 " in shared.raw(b"PATCH /health " + head)
    assert b" 404 " in shared.raw(b"POST /api/tasks/none/cancel " + head)


def test_a_mirror_that_was_cut_off_while_it_was_made_is_made_whole(stand: Stand) -> None:
    mirror = stand.work / "mirrors" / stand.hub.url[7:].replace(":", "_") / f"{stand.name}.git"
    (mirror / "refs").mkdir(parents=True)
    (mirror / "HEAD").write_text("ref: refs/heads/main\n")
    (mirror / "config.lock").touch()
    stand.done(stand.submit())


def test_without_github_urls_are_held_against_the_work_dir_and_the_allowed_list(
    stand: Stand,
) -> None:
    stand.start("--no-github", CODEBOT_ALLOWED_REPOSITORIES="https://git.acme.com/acme/*")
    odd = f"{stand.work}/task_x/home/x%2f..%2f..%2fsrv"  # git takes a path as it is written
    paths = [f"{stand.work}/task_x/repo", f"file://{stand.work}/%74ask_x", "/proc/1/root/srv"]
    paths += ["//proc/1/root/srv", "file:////proc/1/root/srv", "file://h//proc/1/root/srv"]
    cases = [(path, 400, "work-dir") for path in paths]  # the hooks of a workspace would run
    dots = (odd, f"/x/../{stand.work}", "https://git.acme.com/acme/../x", "git@acme.com:../x")
    cases += [(path, 400, "has . or ..") for path in dots]
    for url in ("https://evil.com/acme/x", "https://git.acme.com/ACME/x"):
        cases.append((url, 403, "not an allowed repository"))
    cases.append(("https://git.acme.com/acme/x", 202, ""))
    for url, status, words in cases:
        answer = stand.post(stand.task(repository_url=url))
        assert (answer.status, words in answer.text) == (status, True), url


def test_an_agent_that_dies_with_the_stop_is_put_back(stand: Stand) -> None:
    stand.agent("block; exit 3")
    task = stand.submit()
    wait_for(stand.reached)
    stand.signal(signal.SIGTERM)
    stand.go()  # both at once, as an init system may do it
    stand.gone()
    stand.agent(HELLO)
    stand.start()
    stand.done(task)


def test_a_secret_is_masked_that_a_line_end_follows_in_its_variable() -> None:
    variables = {"ANTHROPIC_API_KEY": "model-key-1\n", "GITHUB_WEBHOOK_SECRET": " hook-secret-1 "}
    mask = codebot.Mask(codebot.Config(variables=variables))
    assert mask("a model-key-1, a hook-secret-1.") == "a ***, a ***."


def test_a_tls_client_that_resets_at_once_costs_nobody_else_a_connection(stand: Stand) -> None:
    start_tls(stand)
    with socket.create_connection(stand.address(), timeout=0.5) as idle:
        for _ in range(200):
            with socket.create_connection(stand.address()) as one:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                one.sendall(b"x")
        with pytest.raises(socket.timeout):
            idle.recv(1)


def test_a_look_that_takes_longer_than_the_retention_keeps_its_folder(stand: Stand) -> None:
    stand.start(CODEBOT_TASK_RETENTION="1", CODEBOT_REVIEW_WORKERS="2")
    look = '[ "$asked" = Comment: ] && block; kind question; '
    opened(stand, f'[ "$asked" = Task: ] && {{ {HELLO}; exit; }}; {look}answer Because')
    stand.inline("alice", "Why?")
    wait_for(stand.reached)
    [objects] = stand.work.glob("look_*/objects")
    before = stand.folders()
    orphan = stand.work / "task_0000000"
    orphan.mkdir()
    os.utime(orphan, (1, 1))
    wait_for(lambda: stand.folders() == before)  # the orphan is renamed, then removed
    assert objects.exists()
    stand.go()
    wait_for(stand.answers)


def test_of_many_files_the_first_are_named_and_all_are_counted(shared: Stand) -> None:
    shared.agent("for i in $(seq -w 300); do echo $i >f$i; done; result Many")
    shared.done(shared.submit())
    body = shared.pulls[0]["body"]
    assert (" f001 " in body, body.count(" | 1 +\n")) == (True, 50)
    assert " ...\n 300 files changed, 300 insertions(+)\n" in body


def test_check_goes_on_where_the_work_dir_cannot_be_made(stand: Stand) -> None:
    (stand.top / "file").touch()
    done = stand.run("check", "--work-dir", str(stand.top / "file" / "work"))
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert re.search("^FAIL .*work-dir and sandbox: ", done.stdout, re.MULTILINE), done.stdout
    assert re.search("^ok .*GitHub answers", done.stdout, re.MULTILINE), done.stdout


def test_a_round_has_left_before_the_next_can_begin(stand: Stand) -> None:
    """Else its end took away what cancels the next one, whose worker then died of that."""
    app = codebot.App(codebot.load_config({"no_github": True, "work_dir": str(stand.top)}))
    left: list[bool] = []

    class Watched(codebot.Store):
        def forget(self, of: tuple[str, int]) -> None:
            left.append(not app.reviewing)
            super().forget(of)

    class Gone:
        def ask(self, *_: Any) -> None:
            raise codebot.Dropped("it is closed")

    app.store = Watched(str(stand.top / "codebot.db"))
    task = {**dict.fromkeys((*codebot.FIELDS, "branch", "base_name"), "x"), "id": "1"}
    pull = {"number": 1, "state": "open", "created_at": "", "html_url": ""}
    repository = {"id": 1, "full_name": "acme/widget"}
    task |= {"folder": "task_1", "mirror": "m"}
    app.store.add_pull(task, {**pull, "base": {"repo": repository}}, NAME)
    codebot.run_review(Gone(), app, 1)
    assert left == [True]


def test_a_pull_request_that_github_tells_little_of_completes_its_task(shared: Stand) -> None:
    few = {"number": 10**6, "html_url": f"{shared.url()}/pull/{10**6}", "state": "open"}
    shared.hub.fault("POST .*/pulls$", (201, few, {}))
    assert shared.done(shared.submit())["pr_url"] == few["html_url"]


def test_a_bad_flag_is_told_by_its_name_together_with_bad_settings(stand: Stand) -> None:
    done = stand.run("serve", "--port", "many", "--workers", "0", CODEBOT_MAX_TURNS="x")
    assert done.returncode == 2
    for words in ("--port: 'many'", "--workers: '0'", "CODEBOT_MAX_TURNS: 'x'"):
        assert f"codebot: {words} is not a" in done.stderr
    (stand.here / ".env").write_text("what is this\n")
    done = stand.run("serve", "--port", "65536", "--workers", "0")
    assert done.returncode == 2
    for words in ("--port: '65536' is not a number from 0", "--workers: '0'", ".env, line 1"):
        assert words in done.stderr
    for port in ("0", "80", "9999", "65535"):
        assert re.fullmatch(codebot.PORTS, port)


def test_a_base_that_moves_before_it_is_fetched_is_asked_for_again(stand: Stand) -> None:
    refs = "GET /acme/widget.git/info/refs.*upload"
    who = ("-c", "user.name=x", "-c", "user.email=x@x")

    def force() -> None:
        new = stand.git(*who, "commit-tree", "-m", "Begun anew", "main^{tree}").strip()
        stand.git("update-ref", "refs/heads/main", new)

    stand.hub.fault(refs, lambda: None, force)
    result = stand.done(stand.submit())
    assert stand.git("rev-parse", f"{result['commit']}^") == stand.git("rev-parse", "main")


def test_a_pull_request_goes_on_in_a_work_dir_that_was_moved(stand: Stand) -> None:
    task, result = opened(stand, CHANGE)
    stand.stop()
    old, stand.work = stand.work, stand.top / "moved"
    old.rename(stand.work)
    stand.start()
    stand.inline("alice", "Say more")
    assert stand.rounds(task, 1)[0]["error"] is None
    assert (stand.shown(result, "hello.txt"), old.exists()) == ("hello\nmore", False)


def test_a_remote_that_says_429_to_git_is_asked_again(stand: Stand) -> None:
    stand.hub.fault("GET /acme/widget.git/info/refs", (429, b"slow down", {}))
    stand.done(stand.submit())


def test_what_the_tests_leave_behind_is_not_committed(stand: Stand) -> None:
    litter = "echo >report.xml; mkdir -p cache && echo >cache/x; echo no >hello.txt; rm README.md"
    task = stand.submit(test_command=f"grep -q hello hello.txt && {litter}")
    result = stand.done(task)
    assert stand.shown(result, "hello.txt") == "hello"
    assert stand.git("diff", "--name-only", "main", result["branch_name"]) == "hello.txt"


def test_files_are_named_as_people_name_them(stand: Stand) -> None:
    stand.agent("echo x >'gr\N{LATIN SMALL LETTER U WITH DIAERESIS}n 1.txt'; result Done")
    stand.done(stand.submit())
    assert "gr\N{LATIN SMALL LETTER U WITH DIAERESIS}n 1.txt" in stand.hub.pulls[0]["body"]


def test_looks_at_a_pull_request_leave_no_rows(tmp_path: Path) -> None:
    store = codebot.Store(str(tmp_path / "db"))
    for _ in range(3):
        assert store.take(1, [{}])
    assert len(store.read("SELECT 1 FROM reviews")) == 1
    assert not store.read("SELECT 1 FROM comments")


def test_a_round_outlives_a_github_that_refuses_for_a_moment(stand: Stand) -> None:
    stand.start(CODEBOT_TASK_RETENTION="1")
    opened(stand, QUESTION)
    suspended = (403, {"message": "This installation is suspended"})
    stand.hub.fault(r"GET .*/pulls/\d+$", *[suspended] * (codebot.INTERRUPTIONS + 1))
    stand.comment("alice", "Why?")
    stand.logged("is put back: 403 This installation is suspended", codebot.INTERRUPTIONS + 1)
    assert "Because" in wait_for(stand.answers)[0]
    stand.hub.fault(r"POST .*/comments$", suspended)
    stand.comment("alice", "And why else?")
    wait_for(lambda: len(stand.answers()) == 2)
    assert len(stand.asked("Question")) == 2  # the answer was kept meanwhile


def test_a_look_that_was_paid_for_is_not_paid_for_again(stand: Stand) -> None:
    stand.start(CODEBOT_TASK_RETENTION="1", limits={"GITHUB_WAIT": 0.5, "GIT_WAIT": 0})
    opened(stand, QUESTION)
    stand.hub.tokens.clear()
    refs = "GET /acme/widget.git/info/refs"
    stand.hub.fault(refs, (503, b"", {}))
    stand.comment("alice", "Why?")
    stand.logged("is put back: ")
    wait_for(stand.answers)
    assert len(stand.asked("Comment")) == 1


def test_a_task_goes_on_in_a_work_dir_that_was_moved(stand: Stand) -> None:
    hold = stand.hub.hold("POST /repos/acme/widget/pulls$")
    task = stand.submit()
    assert hold.reached.wait(20)
    stand.kill()
    hold.go.set()
    old, stand.work = stand.work, stand.top / "moved"
    old.rename(stand.work)
    stand.start()
    assert stand.done(task)["pr_number"] == 1
    assert (len(stand.seen("argv")), old.exists()) == (1, False)


def test_a_repository_that_took_the_name_of_another_is_not_acted_on(shared: Stand) -> None:
    _, result = opened(shared, QUESTION)
    pull = shared.pulls[-1]
    pull["base"] = {**pull["base"], "repo": {**pull["base"]["repo"], "id": 999}}
    pull["state"] = "closed"
    shared.comment("alice", "Why?")
    shared.logged("is dropped: another repository has the name by now")
    assert Path(result["work_dir"]).exists()


def test_no_secret_gets_into_a_branch_or_past_json_into_a_pull_request(stand: Stand) -> None:
    secret = 'word "quoted" 1234'
    stand.start(CODEBOT_AGENT_ENV="NPM_AUTH", NPM_AUTH=secret)
    task = stand.submit(f"Use {secret}", ticket_id=KEY, ticket_summary=f"Say {secret}")
    branch = stand.done(task)["branch_name"]
    said = json.dumps(stand.pulls)
    assert (KEY in branch + said, "quoted" in branch + said) == (False, False)
    assert stand.pulls[0]["title"] == "***: Say ***"


def test_a_mirror_with_refs_of_an_older_version_is_gone_on_with(stand: Stand) -> None:
    task, result = opened(stand, CHANGE)
    [mirror] = stand.work.glob("mirrors/*/acme/widget.git")
    name = Path(result["work_dir"]).parent.name[-7:]
    for end in ("base", "head"):
        ref = f"refs/codebot/{name}/{end}"
        sh("git", "--git-dir", str(mirror), "update-ref", ref, result["commit"])
    stand.comment("alice", "Say more")
    assert stand.rounds(task, 1)[0]["state"] == "completed"


def test_a_push_is_known_again_though_its_mirror_was_lost(stand: Stand) -> None:
    hold = stand.hub.hold("POST /repos/acme/widget/pulls$")
    task = stand.submit()
    assert hold.reached.wait(20)
    stand.kill()
    hold.go.set()
    shutil.rmtree(stand.work / "mirrors")
    stand.start()
    assert stand.done(task)["pr_number"] == 1
    assert len(stand.seen("argv")) == 1  # the agent is not asked again


def test_a_damaged_mirror_is_made_anew(stand: Stand) -> None:
    stand.start(limits={"GIT_WAIT": 0})
    stand.done(stand.submit())
    [mirror] = stand.work.glob("mirrors/*/acme/widget.git")
    for broken in ("refs/heads/main", "HEAD"):  # as a power cut may leave them
        (mirror / broken).write_text("")
        stand.done(task := stand.submit())
        assert any("The mirror is damaged, and" in event for event in stand.events(task))


def test_a_log_that_nobody_reads_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    end, full = os.pipe()
    os.set_blocking(full, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(full, bytes(65_536))
    os.set_blocking(full, True)
    with os.fdopen(end, "rb"), os.fdopen(full, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        record = logging.LogRecord("codebot", logging.INFO, "", 0, "hello", None, None)
        codebot.Mask(codebot.Config()).emit(record)


@needs_bwrap
def test_what_is_as_young_as_the_index_is_not_stored_again(stand: Stand) -> None:
    stand.start(CODEBOT_SANDBOX="bwrap", limits={"LARGE": -1})
    result = stand.done(stand.submit(test_command="true"))
    blob = sh("git", "rev-parse", "HEAD:README.md", cwd=Path(result["work_dir"])).strip()
    loose = Path(result["work_dir"], ".git", "objects", blob[:2], blob[2:])
    assert not loose.exists()  # the mirror has it


def test_secrets_of_the_agent_are_masked_line_by_line() -> None:
    given = ("MYSQL_PWD", "npm_token", "DATABASE_URL", "DEPLOY_KEY", "STAGE")
    values = ("pass-word", "token-1", "db://user:word@host", "first-line\nsecond-line", "staging")
    variables = dict(zip(given, values), ANTHROPIC_BASE_URL="https://me:pass-phrase@proxy")
    mask = codebot.Mask(codebot.Config(variables=variables, agent_names=given))
    for secret in (*values[:3], "first-line", "second-line", "pass-phrase"):
        assert mask(f"it is {secret}.") == "it is ***."
    assert mask("staging") == "staging"


def test_a_mirror_is_packed_and_keeps_what_no_branch_has(stand: Stand) -> None:
    mirror = str(stand.top / "mirror")
    sh("git", "init", "-q", "--bare", mirror)
    where = ("git", "-C", mirror, "-c", "fastimport.unpackLimit=0")
    for number in range(51):
        text = f"blob\nmark :1\ndata <<X\n{number}\nX\n"
        subprocess.run([*where, "fast-import", "--quiet"], input=text.encode(), check=True)
    lost = sh(*where, "hash-object", "-w", "HEAD", cwd=stand.top / "mirror").strip()
    lock = Path(mirror, "objects", "pack", "tmp_pack_x")
    lock.touch()
    os.utime(lock, (1, 1))
    killed = lock.with_name(".tmp-1-pack-x.pack")  # a repack was
    killed.touch()
    os.utime(killed, (1, 1))
    app = codebot.App(codebot.Config(no_github=True, variables={}, work_dir=str(stand.top)))
    codebot.tidy(app, mirror, needed=True)
    assert sh(*where, "cat-file", "-t", lost).strip() == "blob"
    assert not (lock.exists() or killed.exists())
    assert len(list(lock.parent.glob("*.pack"))) == 1
    for number in range(51):
        shutil.copy(next(lock.parent.glob("pack-*.pack")), lock.parent / f"more-{number}.pack")
    sh(*where, "update-ref", "refs/codebot/1234567/head", lost)  # of a task that was killed
    codebot.tidy(app, mirror, needed=False)
    assert subprocess.run([*where, "cat-file", "-e", lost], check=False).returncode


def test_a_relative_place_on_path_is_none_for_codebot() -> None:
    given = f"node_modules/.bin::./bin:{os.defpath}:"
    path = codebot.Config(path=codebot.places(given)).path
    assert path == os.defpath.lstrip(":")
    variables = {"PATH": given, "CODEBOT_API_KEYS": "a-key-of-some-length", "HOME": "/"}
    argv = (
        sys.executable,
        "-c",
        "import codebot; print(codebot.load_config({'no_github': 1}).path)",
    )
    assert sh(*argv, cwd=Path(codebot.__file__).parent, **variables).strip() == path


def test_a_task_may_not_use_the_last_of_the_disk(stand: Stand) -> None:
    stand.work.mkdir(mode=0o755)
    stand.start(limits={"DISK_KEPT": 1 << 60})
    task = stand.submit()
    assert "The work-dir's disk is full" in stand.failed(task, "internal")
    assert not stand.folders()  # it could be what fills the disk
    assert stand.status(stand.submit())["status"] == "pending"  # it would meet the same
    mirror = stand.work / "mirrors" / "host" / "acme" / "widget.git"
    left = mirror / "objects" / "pack" / "tmp_pack_x"
    left.parent.mkdir(parents=True)
    left.write_text("of a fetch that was ended")
    app = codebot.App(codebot.load_config({"no_github": True, "work_dir": str(stand.work)}))
    row = codebot.Store(str(stand.work / "codebot.db")).get(task)
    job = codebot.Job(app, dict(row), threading.Event())
    job.mirror = str(mirror)
    assert not codebot.make_room(app, job, OSError(errno.EMFILE, "x"))
    assert left.exists()
    assert codebot.make_room(app, job, OSError(errno.ENOSPC, "x"))
    assert not left.exists()
    [mode] = {path.stat().st_mode & 0o077 for path in stand.work.iterdir()}
    assert mode == 0  # whoever made the folder


def test_a_round_that_finds_no_room_says_so(stand: Stand) -> None:
    task, _ = opened(stand, QUESTION)
    stand.kill()
    stand.start(limits={"DISK_KEPT": 1 << 60})
    stand.inline("alice", "Why?")
    assert "The work-dir's disk is full" in stand.rounds(task, 1)[0]["error"]
    assert "I could not do this: internal error: [Errno 28] The work-dir" in stand.answers()[0]
    assert not stand.folders()


def test_a_commit_is_not_given_up_for_a_full_disk(stand: Stand) -> None:
    task, result = opened(stand, CHANGE)
    hold = stand.hub.hold("POST .*/git-receive-pack")
    stand.inline("alice", "Say more")
    assert hold.reached.wait(20)
    stand.kill()
    stand.hub.release()
    stand.start(limits={"DISK_KEPT": 1 << 60})
    stand.logged("The work-dir's disk is full")
    stand.kill()
    stand.start()
    [done] = stand.rounds(task, 1)
    assert done["commit"] == stand.git("rev-parse", result["branch_name"])
    assert f"The change is in {done['commit']}." in stand.answers()[0]


def test_what_someone_took_off_the_branch_does_not_come_back(stand: Stand) -> None:
    task, result = opened(stand, "kind change; block; echo more >>hello.txt; answer Done")
    push_beside(stand, result["branch_name"], secret="not for all\n")
    stand.inline("alice", "Say more")
    wait_for(stand.reached)
    stand.git("update-ref", f"refs/heads/{result['branch_name']}", result["commit"])
    stand.go()
    [failed] = stand.rounds(task, 1)
    assert failed["error"] == "Commits were taken off the branch meanwhile"
    assert stand.git("rev-parse", result["branch_name"]) == result["commit"]


def test_nor_what_is_taken_off_while_the_change_is_tested_on_top_of_it(stand: Stand) -> None:
    stand.start(limits={"GIT_WAIT": 0})
    task, result = opened(stand, CHANGE)
    branch = result["branch_name"]

    def take_off() -> None:
        stand.git("update-ref", f"refs/heads/{branch}", result["commit"])

    def push() -> None:
        push_beside(stand, branch, secret="not for all\n")

    receive, upload = (f"GET .*service=git-{what}-pack" for what in ("receive", "upload"))
    stand.hub.fault(receive, push)
    # two for the work, one before the push, three after it: then the change is rebased and tested
    stand.hub.fault(upload, *[lambda: None] * 6, take_off)
    stand.inline("alice", "Say more")
    [failed] = stand.rounds(task, 1)
    assert failed["error"] == "Commits were taken off the branch meanwhile"
    assert stand.git("rev-parse", branch) == result["commit"]

    stand.hub.fault(receive, push, (503, {"message": "x"}))  # and when it waits for GitHub
    stand.inline("alice", "Say more")
    stand.logged("is put back", 1)
    take_off()
    stand.kill()
    stand.start()
    assert stand.rounds(task, 2)[1]["error"] == "Commits were taken off the branch meanwhile"
    assert stand.git("rev-parse", branch) == result["commit"]


def test_one_that_is_merged_meanwhile_hears_nothing_more(stand: Stand) -> None:
    task, result = opened(stand, "kind change; block; echo more >>hello.txt; answer Done")
    stand.inline("alice", "Say more")
    wait_for(stand.reached)
    stand.pulls[0].update(state="closed", merged=True)  # of which no webhook tells
    stand.git("update-ref", "-d", f"refs/heads/{result['branch_name']}")
    stand.go()
    stand.logged("is dropped: the pull request is merged")
    assert stand.answers() == []
    assert stand.status(task)["result"]["pr_state"] == "merged"


def test_a_change_that_a_reviewer_made_himself_meanwhile_is_his(stand: Stand) -> None:
    task, result = opened(stand, CHANGE)
    same = {"hello.txt": "hello\nmore\n"}
    stand.hub.fault(
        "GET .*service=git-receive-pack",
        lambda: push_beside(stand, result["branch_name"], **same),
    )
    stand.inline("alice", "Say more")
    [done] = stand.rounds(task, 1)
    tip = stand.git("rev-parse", result["branch_name"])
    assert (done["state"], done["commit"]) == ("completed", tip)
    assert "Done 1" in stand.answers()[0]
    assert f"The change is in {tip}." in stand.answers()[0]


def test_git_stays_out_of_a_checkout_that_the_work_dir_lies_in(stand: Stand) -> None:
    sh("git", "init", "-q", str(stand.top))
    (stand.top / "staged").write_text("the operator's\n")
    sh("git", "add", "staged", cwd=stand.top)
    stand.agent("rm -rf .git; result Done")
    assert "not a git repository" in stand.failed(stand.submit(), "agent_failed")
    assert sh("git", "status", "--short", "staged", cwd=stand.top).strip() == "A  staged"


def test_a_repository_that_is_gone_is_looked_at_no_more(stand: Stand) -> None:
    task, _ = opened(stand, "")
    no = {"message": "There is at least one repository that does not exist or is not accessible"}
    refused = {"message": "The permissions requested are not granted to this installation."}

    def look(times: int, message: Any) -> None:
        stand.kill()
        stand.hub.faults.clear()
        stand.hub.fault("POST .*/access_tokens$", *[(422, message)] * 9)
        stand.start()
        stand.logged(f"is put back: 422 {message['message']}", times)

    def past() -> None:
        with stand.database() as db:
            db.execute("UPDATE reviews SET submitted_at = '2026-01-01'")

    look(1, no)  # for an hour it may come back
    past()
    look(1, refused)  # which is no word on the repository
    assert stand.status(task)["result"]["pr_state"] == "open"
    stand.kill()
    past()
    stand.hub.faults.clear()
    stand.hub.fault("POST .*/access_tokens$", *[(422, no)] * 9)
    stand.start()
    stand.logged("is dropped: 422 There is at least one repository", 1)
    wait_for(lambda: stand.status(task)["result"]["pr_state"] == "closed")
    with stand.database() as db:
        [[closed]] = db.execute("SELECT closed_at FROM pulls")
        db.execute("UPDATE pulls SET closed_at = '2026-01-01'")
    assert closed
    stand.kill()
    stand.start()  # looks again, at once for the last time
    stand.logged("is dropped: 422 There is at least one repository", 2)
    with stand.database() as db:
        assert list(db.execute("SELECT closed_at FROM pulls")) == [("2026-01-01",)]


def test_silence_is_the_agents_and_the_tests_alone(stand: Stand) -> None:
    stand.start(CODEBOT_STALL_TIMEOUT="1", limits={"RESULT_GRACE": 1.5})
    # a filter makes git slow; and an agent is not waited for when it has told its result
    slow = "git config filter.slow.clean 'sleep 1.5; cat'; echo '* filter=slow' >.gitattributes"
    assert stand.done(stand.submit_each([f"{slow}; {HELLO}; sleep 9"])[0])["commit"]


def test_a_redirect_does_not_lead_past_the_allowed_list(stand: Stand) -> None:
    class Elsewhere(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("Location", f"{hub.url}{self.path}")
            self.end_headers()

    hub = stand.hub
    with http.server.HTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        allowed = f"http://127.0.0.1:{server.server_port}"
        stand.start("--no-github", CODEBOT_ALLOWED_REPOSITORIES=f"{allowed}/*")
        url = f"{allowed}/{NAME}.git"
        assert "302" in stand.failed(stand.submit(repository_url=url), "clone_failed")
        server.shutdown()
        thread.join()
    assert hub.calls == []


def test_debug_says_more_but_no_secret(stand: Stand) -> None:
    stand.start("--debug")
    stand.done(stand.submit())
    for words in ("POST /api/tasks/submit HTTP/1.1': 202", "runs ('git', ", "GitHub: POST http"):
        assert words in stand.log()
    assert not [secret for secret in stand.secrets() if secret in stand.log()]


def test_the_apps_key_is_masked(stand: Stand) -> None:
    stand.agent(f"cat '{stand.key}'; {HELLO}")  # which without a sandbox it can read
    task = stand.submit()
    stand.done(task)
    events = "".join(stand.events(task))
    assert "agent: ***" in events
    assert not [line for line in stand.key.read_text().splitlines()[:-2] if line in events]


def test_a_server_error_that_asks_for_patience_gets_it() -> None:
    hub = codebot.GitHub(codebot.App(codebot.Config(no_github=True)))
    assert hub._wait(503, "", {"retry-after": "7"}, 2.0) == 7
    assert hub._wait(503, "", {"retry-after": "1"}, 2.0) == 2
    assert hub._wait(503, "", {}, 2.0) == 2
    assert hub._wait(404, "", {"retry-after": "7"}, 2.0) is None


def test_an_odd_proxy_stops_nothing_and_its_password_is_masked() -> None:
    variables = {"HTTPS_PROXY": "http://me:pass@phrase@[x", "HTTP_PROXY": "http://[x"}
    assert codebot.Mask(codebot.Config(variables=variables))("a pass@phrase") == "a ***"


def test_a_long_record_waits_for_no_reader_either(monkeypatch: pytest.MonkeyPatch) -> None:
    end, pipe = os.pipe()
    with os.fdopen(pipe, "w") as stderr, os.fdopen(end, "rb"):  # closed first: nobody hangs
        monkeypatch.setattr(sys, "stderr", stderr)
        record = logging.LogRecord("codebot", logging.INFO, "", 0, "h" * 200_000, None, None)
        writer = threading.Thread(
            target=codebot.Mask(codebot.Config()).emit, args=(record,), daemon=True
        )
        writer.start()
        writer.join(10)
        assert not writer.is_alive()


def test_run_tells_its_sandbox_and_cancels_what_is_stopped(stand: Stand) -> None:
    done = stand.run("run", "--task", "-", stdin="[" * 100_000)
    assert (done.returncode, "expected as a JSON object" in done.stderr) == (2, True)
    stand.agent("block")
    argv = [*stand.words({}), "run", "--work-dir", str(stand.work), "--task", "-"]
    how: dict[str, Any] = {"cwd": stand.here, "env": stand.environment(), "text": True}
    how |= dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(argv, **how) as run:
        assert run.stdin
        run.stdin.write(json.dumps(stand.task()))
        run.stdin.close()
        wait_for(stand.reached)
        run.send_signal(signal.SIGINT)
        assert run.stdout and run.stderr
        assert json.load(run.stdout)["reason"] == "cancelled"
        assert "Sandbox: NONE: the agent can read codebot's files" in run.stderr.read()
    assert run.returncode == 1
    stand.go()


def test_what_git_says_is_final_only_if_it_is() -> None:
    at = "fatal: unable to access 'https://github.com/acme/access-denied.git/': "
    to = "! refs/heads/x:refs/heads/x [remote rejected]"
    for text, final in (
        (f"{at}The requested URL returned error: 502", False),
        (f"{at}The requested URL returned error: 429", False),
        (f"{at}The requested URL returned error: 403", True),
        (f"{at}The requested URL returned error: 301", True),
        ("error: 42 bytes of body are still expected", False),
        ("To https://github.com/acme/access-denied.git\nfatal: the remote end hung up", False),
        ("fatal: repository 'https://github.com/acme/x/' not found", True),
        (f"{to} (Internal Server Error)", False),
        (f"{to} (fatal error in commit_refs)", False),
        (f"{to} (protected branch hook declined)", True),
        (f"remote: You can't do this.\n{to} (hook declined)\nerror: to 'https://x/y'", True),
    ):
        assert codebot.is_final(text) == final, text


def test_what_was_done_in_spite_of_a_401_is_not_done_again() -> None:
    class Github(codebot.GitHub):
        def token(self, job: Any) -> str:
            return "token"

        def _once(self, method: str, *_: Any) -> tuple[int, Any, Any]:
            asked.append(method)
            return 401, "Bad credentials", {}

    asked: list[str] = []
    hub = Github(codebot.App(codebot.Config(no_github=True)))
    assert hub._call("POST", "/repos/acme/widget/pulls", there=lambda: "it")[0] == "it"
    assert asked == ["POST"]
