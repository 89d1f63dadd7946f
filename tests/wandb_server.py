"""A Weights & Biases server for tests: runs, their files and history, and what can go wrong on the way."""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

KEY = "0123456789" * 4
LOGIN = "Basic " + base64.b64encode(f"api:{KEY}".encode()).decode()
PAGE = 4  # files a page of a listing, so that there are several


@dataclass
class RemoteRun:
    """A run as the server has it."""

    files: dict[str, bytes]
    state: str = "finished"
    says: dict[str, dict] = field(default_factory=dict)  # name -> what the listing says of it instead of the truth
    history: list[dict] = field(default_factory=list)  # a row a step, as its writer logged them
    config: dict = field(default_factory=dict)
    preempting: bool = False


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.owner.file(self, unquote(self.path))

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/graphql":
            self.server.owner.graphql(self, json.loads(body))
        elif self.path.endswith("/file_stream"):
            self.server.owner.stream(self, json.loads(body))
        else:
            self.answer(404, b"")  # the client's own telemetry

    def do_PUT(self):
        _, path, name = unquote(self.path).split("//", 2)
        self.server.owner.runs[path].files[name] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(200, b"")

    def answer(self, status: int, body: bytes, length: int | None = None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)


class Server:
    """Speaks what wandb's client needs to write and read runs, on a port of its own, in threads of this process."""

    def __init__(self):
        self.port, self.listening = 0, False
        self.reset()

    def reset(self) -> None:
        """Forget all runs, faults and requests; answer again."""
        self.runs: dict[str, RemoteRun] = {}  # entity/project/id -> run
        self.faults: dict[str, list] = {}  # file name, "graphql" or "stream" -> what its next requests meet
        self.asked: list[str] = []  # the file name, "graphql" or "stream", of each request
        self.endless = 0  # bytes that a client took of a body without end
        self.start()

    def start(self) -> None:
        if self.listening:
            return
        self.http = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.http.owner, self.http.daemon_threads = self, True
        self.http.handle_error = lambda *_: None  # a client that went away
        self.port, self.listening = self.http.server_port, True
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """No one answers at the port any more."""
        if self.listening:
            self.http.shutdown()
            self.http.server_close()
            self.listening = False

    @property
    def environment(self) -> dict[str, str]:
        """What makes wandb's client ask here."""
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self.port}", "WANDB_API_KEY": KEY, "WANDB_HTTP_TIMEOUT": "5"}

    def downloads(self) -> list[str]:
        return sorted(name for name in self.asked if name not in ("graphql", "stream"))

    def met(self, handler, name: str, body: bytes) -> bool:
        """Whether a fault took the place of the answer: a status, "cut" or "endless"."""
        self.asked.append(name)
        fault = self.faults[name].pop(0) if self.faults.get(name) else None
        if isinstance(fault, int):
            handler.answer(fault, b"no")
        elif fault == "cut":  # announced whole, sent by half
            handler.answer(200, body[: len(body) // 2], len(body))
        elif fault == "endless":
            handler.answer(200, body, 2**40)
            for _ in range(2**10):
                self.endless += handler.wfile.write(bytes(2**20))
        handler.close_connection = bool(fault)
        return bool(fault)

    def file(self, handler, path: str) -> None:
        _, place, entity, project, run_id, name = path.split("/", 5)
        body = self.runs[f"{entity}/{project}/{run_id}"].files[name]
        if not self.met(handler, name, body):
            # as W&B's files, which want the login, and as a bucket, which refuses one beside its signed address
            allowed = handler.headers["Authorization"] == (LOGIN if place == "files" else None)
            handler.answer(200 if allowed else 401, body if allowed else b"")

    def graphql(self, handler, request: dict) -> None:
        query, given = request["query"], request.get("variables") or {}
        if self.met(handler, "graphql", b""):
            return
        if handler.headers["Authorization"] != LOGIN:
            return handler.answer(401, b'{"errors": [{"message": "user is not logged in"}]}')
        data = {"viewer": {"id": "1", "entity": "me", "username": "me", "email": "", "flags": "{}", "teams": None}}
        path = f"{given.get('entity') or 'me'}/{given.get('project')}/{given.get('name') or given.get('run')}"
        run = self.runs.get(path)
        if "upsertBucket" in query:
            run = self.runs.setdefault(path, RemoteRun({}))
            run.state = "running"
            run.config |= json.loads(given["config"] or "{}")
            data = {"upsertBucket": {"bucket": self.bucket(run, path), "inserted": True}}
        elif "query RunResumeStatus" in query:
            data = {"model": run and {"id": "1", "name": "p", "entity": None, "bucket": self.bucket(run, path)}}
        elif "createRunFiles" in query:
            urls = [{"name": n, "uploadUrl": f"http://127.0.0.1:{self.port}/up//{path}//{n}"} for n in given["files"]]
            data = {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": urls}}
        elif "project(" in query:
            data = {"project": {"internalId": "1", "run": run and self.run(run, path, given)}}
        handler.answer(200, json.dumps({"data": data}).encode())

    def stream(self, handler, sent: dict) -> None:
        """Rows of history, and the end of a run."""
        if self.met(handler, "stream", b""):
            return
        run = self.runs["/".join(handler.path.split("/")[2:5])]
        rows = sent.get("files", {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
        run.history[rows["offset"] :] = [*map(json.loads, rows["content"])] or run.history[rows["offset"] :]
        run.preempting |= bool(sent.get("preempting"))
        if sent.get("complete"):
            run.state = "finished" if not sent["exitcode"] else "preempted" if run.preempting else "failed"
        handler.answer(200, b"{}")

    def bucket(self, run: RemoteRun, path: str) -> dict:
        """What a client that writes a run learns of it."""
        entity, project, run_id = path.split("/")
        tail = json.dumps([json.dumps(row) for row in run.history[-1:]])
        about = {"id": "1", "name": run_id, "displayName": "a run", "config": json.dumps(run.config), "tags": []}
        about |= {"project": {"id": "1", "name": project, "entity": {"id": "1", "name": entity}}, "wandbConfig": "{}"}
        about |= {"historyLineCount": len(run.history), "eventsLineCount": 0, "logLineCount": 0, "historyTail": tail}
        return about | {"eventsTail": "[]", "summaryMetrics": "{}"}

    def run(self, run: RemoteRun, path: str, given: dict) -> dict:
        """All that the client's queries of a run ask for."""
        first, names, edges = int(given.get("fileCursor") or 0), list(run.files), []
        for i, name in enumerate(names[first : first + PAGE], first + 1):
            md5 = base64.b64encode(hashlib.md5(run.files[name]).digest()).decode()
            node = {"name": name, "url": f"http://127.0.0.1:{self.port}/files/{path}/{name}", "md5": md5}
            node |= {"sizeBytes": str(len(run.files[name]))} | run.says.get(name, {})
            edges.append({"cursor": str(i), "node": node})
        more = {"hasNextPage": first + PAGE < len(names)}
        about = dict.fromkeys(("config", "summaryMetrics", "systemMetrics"), "{}") | {"projectId": "1"}
        about |= {"id": "1", "name": path.rsplit("/", 1)[1], "state": run.state, "fileCount": len(names)}
        return about | {"files": {"edges": edges, "pageInfo": more}}
