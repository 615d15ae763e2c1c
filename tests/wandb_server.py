"""A W&B server for tests: on the loopback, in memory, small, and the real wandb client works against it.

It runs the client's own GraphQL documents over plain dicts. What a client asks that is not here is answered
with null and kept in `unknown`: tests assert that it is empty, so that a new client's new questions show up
as what they are.
Left out: logins, registries, multipart uploads, rewinding, several writers of one run.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = re.compile(r'[\s,]+|#[^\n]*|(\.\.\.|[!$():=@\[\]{}|&]|"""[\s\S]*?"""|"(?:\\.|[^"\\])*"|[-\w.]+)')
ENTITY = "team"


class Document:
    """A GraphQL document's only operation and its fragments; no types, no validation."""

    def __init__(self, text: str) -> None:
        self._tokens = [match[1] for match in TOKEN.finditer(text) if match[1]]
        self._at = 0
        self.name = ""
        self.fields: list[Any] = []
        self.fragments: dict[str, list[Any]] = {}
        self.defaults: dict[str, Any] = {}
        while self._at < len(self._tokens):
            if self._take_if("fragment"):
                name = self._take()
                self._skip_until("{")
                self.fragments[name] = self._selection()
            else:
                if self._take_if("query") or self._take_if("mutation"):
                    self.name = self._take() if self._peek() not in ("(", "{") else ""
                self.defaults = self._variables()
                self._skip_until("{")
                self.fields = self._selection()

    def _peek(self) -> str:
        return self._tokens[self._at]

    def _take(self) -> str:
        self._at += 1
        return self._tokens[self._at - 1]

    def _take_if(self, token: str) -> bool:
        if self._at < len(self._tokens) and self._tokens[self._at] == token:
            self._at += 1
            return True
        return False

    def _variables(self) -> dict[str, Any]:
        """The default values of the operation's variables."""
        defaults, name = {}, ""
        if self._take_if("("):
            while not self._take_if(")"):
                token = self._take()
                if token == "$":
                    name = self._take()
                elif token == "=":
                    defaults[name] = self._value()
        return defaults

    def _skip_until(self, token: str) -> None:
        depth = 0
        while depth or self._peek() != token:
            depth += {"(": 1, ")": -1}.get(self._take(), 0)

    def _selection(self) -> list[Any]:
        """[(kind, alias, name, arguments, selection)] with kind field, spread or inline."""
        found: list[Any] = []
        self._take()
        while not self._take_if("}"):
            if self._take_if("..."):
                if self._peek() == "{" or self._take_if("on"):
                    kind = "" if self._peek() == "{" else self._take()
                    self._directives()
                    found.append(("inline", "", kind, {}, self._selection()))
                else:
                    found.append(("spread", "", self._take(), {}, []))
                    self._directives()
                continue
            alias = name = self._take()
            if self._take_if(":"):
                name = self._take()
            arguments = self._arguments()
            directives = self._directives()
            inner = self._selection() if self._peek() == "{" else []
            found.append(("field", alias, name, arguments | directives, inner))
        return found

    def _arguments(self) -> dict[str, Any]:
        values = {}
        if self._take_if("("):
            while not self._take_if(")"):
                name = self._take()
                self._take()
                values[name] = self._value()
        return values

    def _directives(self) -> dict[str, Any]:
        conditions = {}
        while self._take_if("@"):
            name = self._take()
            conditions[f"@{name}"] = self._arguments()
        return conditions

    def _value(self) -> Any:
        token = self._take()
        if token == "$":
            return ("variable", self._take())
        if token == "[":
            items = []
            while not self._take_if("]"):
                items.append(self._value())
            return items
        if token == "{":
            members = {}
            while not self._take_if("}"):
                name = self._take()
                self._take()
                members[name] = self._value()
            return members
        try:
            return json.loads(token)
        except ValueError:
            return token  # an enum


def resolve(value: Any, variables: dict[str, Any]) -> Any:
    if isinstance(value, tuple):
        return variables.get(value[1])
    if isinstance(value, list):
        return [resolve(item, variables) for item in value]
    if isinstance(value, dict):
        return {name: resolve(item, variables) for name, item in value.items()}
    return value


@dataclass
class Fault:
    """What goes wrong: requests whose path or operation matches get `status`, or no answer for status 0."""

    match: str
    status: int = 503
    times: int = 1 << 30
    seen: int = 0


@dataclass
class Run:
    name: str
    project: str
    number: int
    display_name: str = ""
    group: str = ""
    job_type: str = ""
    state: str = "running"
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    lines: dict[str, list[str]] = field(default_factory=dict)  # of each streamed file
    files: set[str] = field(default_factory=set)
    used: list[str] = field(default_factory=list)  # artifact ids
    logged: list[str] = field(default_factory=list)
    preempting: bool = False
    beat: float = 0.0

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rows as they came, in order."""
        return [json.loads(line) for line in self.lines.get("wandb-history.jsonl", [])]

    @property
    def steps(self) -> list[int]:
        return [row["_step"] for row in self.history]


@dataclass
class Artifact:
    id: str
    kind: str
    collection: str
    project: str
    digest: str
    metadata: str
    run: str
    aliases: list[str]
    version: int
    state: str = "PENDING"
    manifest: str = ""  # blob


class WandbServer:
    """`with WandbServer() as server: environment.update(server.environment(folder))`."""

    def __init__(self, address: str = "127.0.0.1") -> None:
        self.runs: dict[str, Run] = {}
        self.artifacts: dict[str, Artifact] = {}
        self.manifests: dict[str, str] = {}  # id -> artifact id
        self.blobs: dict[str, bytes] = {}
        self.views: dict[str, dict[str, Any]] = {}  # saved workspaces and reports, by id
        self.faults: list[Fault] = []
        self.unknown: set[str] = set()
        self.payloads: list[bytes] = []  # everything any client sent
        self.operations: list[str] = []
        self.down = False
        self.lock = threading.RLock()
        self._http = ThreadingHTTPServer((address, 0), _handler(self))
        self._http.daemon_threads = True
        self.url = f"http://{address}:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> WandbServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._http.server_close()

    def environment(self, folder: Path) -> dict[str, str]:
        """What a client needs to come here and to leave nothing elsewhere."""
        places = {f"WANDB_{n}_DIR": str(folder / n.lower()) for n in ("CONFIG", "CACHE", "DATA", "ARTIFACT")}
        return {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": "0" * 40,
            "WANDB_ERROR_REPORTING": "false",
        } | places

    def artifact(self, name: str) -> Artifact:
        """The committed artifact `collection:alias`; KeyError when there is none."""
        collection, _, alias = name.partition(":")
        for artifact in self.artifacts.values():
            named = alias in (*artifact.aliases, f"v{artifact.version}")
            if artifact.collection == collection and named and artifact.state == "COMMITTED":
                return artifact
        raise KeyError(name)

    def lineage(self) -> set[tuple[str, str]]:
        """The edges of the graph: (run, collection) where it logged, (collection, run) where it used."""
        edges = set()
        for run in self.runs.values():
            edges |= {(run.name, self.artifacts[key].collection) for key in run.logged}
            edges |= {(self.artifacts[key].collection, run.name) for key in run.used}
        return edges

    # ---- requests

    def graphql(self, body: dict[str, Any]) -> dict[str, Any]:
        document = Document(body["query"])
        variables = document.defaults | (body.get("variables") or {})
        roots = [item[2] for item in document.fields]
        self.operations.append(document.name or ",".join(roots))
        with self.lock:
            data = self._select(self._roots(), document.fields, document, variables, document.name)
        return {"data": data}

    def _select(
        self, value: Any, fields: list[Any], document: Document, variables: dict[str, Any], where: str
    ) -> Any:
        if value is None or not fields:
            return value
        if isinstance(value, list):
            return [self._select(item, fields, document, variables, where) for item in value]
        result: dict[str, Any] = {}
        for kind, alias, name, arguments, inner in fields:
            values = resolve(arguments, variables)
            if values.get("@include", {}).get("if") is False or values.get("@skip", {}).get("if") is True:
                continue
            if kind == "spread":
                result |= self._select(value, document.fragments[name], document, variables, where)
            elif kind == "inline":
                if value.get("__typename", name) == name or name in ("Node", "ArtifactCollectionInterface"):
                    result |= self._select(value, inner, document, variables, where)
            elif name in value:
                found = value[name](values) if callable(value[name]) else value[name]
                result[alias] = self._select(found, inner, document, variables, f"{where}.{name}")
            elif name == "__typename":
                result[alias] = "Unknown"
            else:
                self.unknown.add(f"{where}.{name}")
                result[alias] = None
        return result

    def _roots(self) -> dict[str, Callable[[dict[str, Any]], Any]]:
        return {
            "viewer": lambda a: self._user(),
            "serverInfo": lambda a: {"features": [], "cliVersionInfo": {}, "latestLocalVersionInfo": None},
            "entity": lambda a: {"name": a.get("name"), "organization": {"coreWeaveOrganizationId": None}},
            "model": lambda a: self._project(a["name"], a.get("entityName")),
            "project": lambda a: self._project(a["name"], a.get("entityName")),
            "artifact": lambda a: self._artifact(self.artifacts.get(a["id"])),
            "upsertBucket": lambda a: self._upsert_run(a["input"]),
            "createRunFiles": lambda a: self._create_run_files(a["input"]),
            "markRunFilesUploaded": lambda a: {"success": True},
            "createArtifact": lambda a: self._create_artifact(a["input"]),
            "createArtifactManifest": lambda a: self._create_manifest(a["input"]),
            "updateArtifactManifest": lambda a: self._manifest(a["input"]["artifactManifestID"]),
            "createArtifactFiles": lambda a: self._create_files(a["input"]),
            "commitArtifact": lambda a: self._commit(a["input"]["artifactID"]),
            "useArtifact": lambda a: self._use(a["input"]),
            "upsertView": lambda a: self._save_view(a["input"]),
        }

    def _user(self) -> dict[str, Any]:
        teams = {"edges": [{"node": {"name": ENTITY}}]}
        user = {"id": "1", "entity": ENTITY, "username": "tester", "email": "t@example.org", "admin": False}
        return user | {"flags": "{}", "teams": teams, "name": "tester", "apiKeys": {"edges": []}}

    def _project(self, name: str, entity: str | None) -> dict[str, Any]:
        entity = entity or ENTITY
        return {
            "__typename": "Project",
            "id": "UHJvamVjdDoxMg==",
            "internalId": "12",
            "name": name,
            "entityName": entity,
            "entity": {"id": "e", "name": entity},
            "readOnly": False,
            "sweep": None,
            "bucket": lambda a: self._run(self.runs.get(a["name"])),
            "run": lambda a: self._run(self.runs.get(a["name"])),
            "artifact": lambda a: self._named(name, a["name"]),
            "artifactCollection": lambda a: self._collection(a["name"], name),
            "artifactCollectionMembership": lambda a: self._membership(
                self._find(name, *a["name"].split(":"))
            ),
            "artifactType": lambda a: self._artifact_type(a["name"], name),
            "allViews": lambda a: self._views(name, a),
        }

    def _views(self, project: str, asked: dict[str, Any]) -> dict[str, Any]:
        """Those of a kind, and of a name where one is asked for."""
        found = [
            view
            for view in self.views.values()
            if view["projectName"] == project
            and view["type"] == asked.get("viewType", "runs")
            and asked.get("viewName") in (None, view["name"])
        ]
        return {"edges": [{"node": view} for view in found]}

    def _save_view(self, given: dict[str, Any]) -> dict[str, Any]:
        """A view without an id is a new one, whatever its name."""
        if given.get("id") and given["id"] not in self.views:
            raise ValueError(f"there is no view {given['id']}")
        json.loads(given["spec"])
        id = given.get("id") or base64.b64encode(f"View:{len(self.views) + 1}".encode()).decode()
        self.views[id] = self.views.get(id, {}) | given | {"id": id}
        return {"view": self.views[id], "inserted": not given.get("id")}

    def _run(self, run: Run | None) -> dict[str, Any] | None:
        if run is None:
            return None
        lines = run.lines
        history = lines.get("wandb-history.jsonl", [])
        return {
            "__typename": "Run",
            "id": f"run-{run.number}",
            "projectId": "12",
            "project": self._project(run.project, None),
            "name": run.name,
            "displayName": run.display_name,
            "description": None,
            "notes": None,
            "group": run.group,
            "groupName": run.group,
            "jobType": run.job_type,
            "state": run.state,
            "config": json.dumps(run.config),
            "wandbConfig": lambda a: json.dumps(
                {"t": run.config.get("_wandb", {}).get("value", {}).get("t", {})}
            ),
            "summaryMetrics": json.dumps(run.summary),
            "systemMetrics": "{}",
            "tags": run.tags,
            "sweepName": None,
            "sweep": None,
            "commit": None,
            "readOnly": False,
            "createdAt": "2026-01-01T00:00:00",
            "heartbeatAt": "2026-01-01T00:00:00",
            "computeSeconds": 0,
            "user": {"name": "tester", "username": "tester"},
            "historyKeys": {"lastStep": run.steps[-1] if history else -1, "keys": {}, "sets": []},
            "historyLineCount": len(history),
            "eventsLineCount": len(lines.get("wandb-events.jsonl", [])),
            "logLineCount": len(lines.get("output.log", [])),
            "historyTail": json.dumps(history[-1:]),
            "eventsTail": json.dumps(lines.get("wandb-events.jsonl", [])[-1:]),
            "history": lambda a: [
                line
                for line in history
                if a.get("minStep", 0) <= json.loads(line)["_step"] < (a.get("maxStep") or 1 << 60)
            ],
            "stopped": False,
            "inputArtifacts": lambda a: self._edges(
                [self._artifact(self.artifacts[key]) for key in run.used]
            ),
            "outputArtifacts": lambda a: self._edges([self._artifact(self.artifacts[k]) for k in run.logged]),
        }

    @staticmethod
    def _edges(nodes: list[Any]) -> dict[str, Any]:
        page = {"endCursor": None, "hasNextPage": False}
        return {
            "totalCount": len(nodes),
            "pageInfo": page,
            "edges": [{"node": n, "cursor": ""} for n in nodes],
        }

    def _upsert_run(self, given: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(given.get("name") or "")
        inserted = run is None
        if run is None and given.get("id"):
            run = next((r for r in self.runs.values() if f"run-{r.number}" == given["id"]), None)
            inserted = run is None
        if run is None:
            run = Run(given["name"], given.get("modelName") or "", len(self.runs) + 1)
            self.runs[run.name] = run
        if given.get("config"):
            run.config = json.loads(given["config"])
        if given.get("summaryMetrics"):
            run.summary |= json.loads(given["summaryMetrics"])
        run.display_name = given.get("displayName") or run.display_name
        run.group = given.get("groupName") or run.group
        run.job_type = given.get("jobType") or run.job_type
        run.tags = given["tags"] if given.get("tags") is not None else run.tags
        run.preempting = run.preempting and run.state == "running"
        run.state = given.get("state") or "running"
        return {"bucket": self._run(run), "inserted": inserted}

    def stream(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        """The client's periodic upload of new lines."""
        with self.lock:
            run = self.runs[name]
            run.beat = time.monotonic()
            for file, part in (body.get("files") or {}).items():
                lines = run.lines.setdefault(file, [])
                offset = part["offset"] if file != "wandb-summary.json" else 0
                if offset > len(lines):
                    self.unknown.add(f"file_stream: {file} at {offset} leaves a hole after {len(lines)}")
                lines[offset : offset + len(part["content"])] = part["content"]
                if file == "wandb-summary.json":
                    run.summary = json.loads(part["content"][-1])
            run.preempting = run.preempting or bool(body.get("preempting"))
            if body.get("complete"):
                failed = "preempted" if run.preempting else "failed"
                run.state = failed if body.get("exitcode") else "finished"
        return {"exitcode": None, "limits": {}, "stopped": False}

    # ---- files and artifacts

    def _place(self, key: str) -> str:
        return f"{self.url}/blobs/{key}"

    def _create_run_files(self, given: dict[str, Any]) -> dict[str, Any]:
        run = self.runs[given["runName"]]
        run.files |= set(given["files"])
        files = [{"name": n, "uploadUrl": self._place(f"runs/{run.name}/{n}")} for n in given["files"]]
        return {"runID": f"run-{run.number}", "uploadHeaders": [], "files": files}

    def _create_artifact(self, given: dict[str, Any]) -> dict[str, Any]:
        if given["entityName"] != ENTITY:
            raise ValueError(f"an artifact of entity {given['entityName']!r}")
        collection = (given.get("artifactCollectionNames") or [given.get("artifactCollectionName")])[0]
        same = [a for a in self.artifacts.values() if a.collection == collection]
        aliases = [alias["alias"] for alias in given.get("aliases") or []]
        artifact = next((a for a in same if a.digest == given["digest"] and a.state == "COMMITTED"), None)
        if artifact is None:
            artifact = Artifact(
                f"artifact-{len(self.artifacts) + 1}",
                given["artifactTypeName"],
                collection,
                given["projectName"],
                given["digest"],
                given.get("metadata") or "{}",
                given.get("runName") or "",
                aliases,
                len(same),
            )
            self.artifacts[artifact.id] = artifact
        else:
            artifact.aliases += [alias for alias in aliases if alias not in artifact.aliases]
        for other in same:
            if other is not artifact:
                other.aliases = [alias for alias in other.aliases if alias not in aliases]
        run = self.runs.get(artifact.run) if artifact.run else None
        if run and artifact.id not in run.logged:
            run.logged.append(artifact.id)
        return {"artifact": self._artifact(artifact)}

    def _create_manifest(self, given: dict[str, Any]) -> dict[str, Any]:
        key = f"manifest-{given['artifactID']}"
        self.manifests[key] = given["artifactID"]
        self.artifacts[given["artifactID"]].manifest = f"manifests/{key}"
        return self._manifest(key)

    def _manifest(self, key: str) -> dict[str, Any]:
        file = {"id": key, "uploadUrl": self._place(f"manifests/{key}"), "uploadHeaders": []}
        return {"artifactManifest": {"id": key, "file": file}}

    def _create_files(self, given: dict[str, Any]) -> dict[str, Any]:
        nodes = []
        for spec in given["artifactFiles"]:
            digest = base64.b64decode(spec["md5"]).hex()
            node = {
                "id": digest,
                "name": spec["name"],
                "storagePath": f"files/{digest}",
                "uploadUrl": self._place(f"files/{digest}"),
                "uploadHeaders": [],
                "uploadMultipartUrls": None,
                "artifact": {"id": spec["artifactID"]},
            }
            nodes.append(node)
        return {"files": self._edges(nodes)}

    def _commit(self, key: str) -> dict[str, Any]:
        artifact = self.artifacts[key]
        artifact.state = "COMMITTED"
        return {"artifact": {"id": artifact.id, "digest": artifact.digest}}

    def _use(self, given: dict[str, Any]) -> dict[str, Any]:
        run = self.runs[given["runName"]]
        if given["artifactID"] not in run.used:
            run.used.append(given["artifactID"])
        return {"artifact": self._artifact(self.artifacts[given["artifactID"]])}

    def _find(self, project: str, collection: str, alias: str) -> Artifact | None:
        try:
            found = self.artifact(f"{collection}:{alias}")
        except KeyError:
            return None
        return found if found.project == project else None

    def _named(self, project: str, name: str) -> dict[str, Any] | None:
        return self._artifact(self._find(project, *name.split(":")))

    def _artifact_type(self, kind: str, project: str) -> dict[str, Any]:
        return {
            "id": kind,
            "name": kind,
            "artifactCollection": lambda a: self._collection(a["name"], project),
        }

    def _collection(self, name: str, project: str) -> dict[str, Any] | None:
        versions = [a for a in self.artifacts.values() if a.collection == name and a.project == project]
        if not versions:
            return None
        return {
            "__typename": "ArtifactSequence",
            "id": f"collection-{name}",
            "name": name,
            "description": None,
            "createdAt": "2026-01-01T00:00:00",
            "tags": {"edges": []},
            "project": self._project(project, None),
            "defaultArtifactType": {"id": versions[0].kind, "name": versions[0].kind},
            "artifactMembership": lambda a: self._membership(self._find(project, name, a["aliasName"])),
        }

    def _membership(self, artifact: Artifact | None) -> dict[str, Any] | None:
        if artifact is None:
            return None
        return {
            "__typename": "ArtifactCollectionMembership",
            "id": f"membership-{artifact.id}",
            "createdAt": "2026-01-01T00:00:00",
            "versionIndex": artifact.version,
            "aliases": [
                {"__typename": "ArtifactAlias", "id": alias, "alias": alias} for alias in artifact.aliases
            ],
            "artifactCollection": self._collection(artifact.collection, artifact.project),
            "artifact": self._artifact(artifact),
            "files": lambda a: self._edges(self._files(artifact)),
        }

    def _files(self, artifact: Artifact) -> list[dict[str, Any]]:
        manifest = json.loads(self.blobs[artifact.manifest])
        nodes = []
        for name, entry in manifest["contents"].items():
            if "ref" not in entry:
                digest = base64.b64decode(entry["digest"]).hex()
                nodes.append({"name": name, "directUrl": self._place(f"files/{digest}")})
        return nodes

    def _artifact(self, artifact: Artifact | None) -> dict[str, Any] | None:
        if artifact is None:
            return None
        sequence = {
            "__typename": "ArtifactSequence",
            "id": f"collection-{artifact.collection}",
            "name": artifact.collection,
            "project": self._project(artifact.project, None),
            "latestArtifact": {"id": artifact.id, "versionIndex": artifact.version},
        }
        aliases = [
            {"__typename": "ArtifactAlias", "id": alias, "alias": alias, "artifactCollection": sequence}
            for alias in artifact.aliases
        ]
        file = {"id": artifact.manifest, "directUrl": self._place(artifact.manifest)}
        return {
            "__typename": "Artifact",
            "id": artifact.id,
            "versionIndex": artifact.version,
            "artifactType": {"id": artifact.kind, "name": artifact.kind},
            "artifactSequence": sequence,
            "description": None,
            "digest": artifact.digest,
            "metadata": artifact.metadata,
            "ttlDurationSeconds": -2,
            "ttlIsInherited": True,
            "tags": [],
            "aliases": aliases,
            "historyStep": None,
            "state": artifact.state,
            "size": 0,
            "fileCount": 1,
            "createdAt": "2026-01-01T00:00:00",
            "updatedAt": "2026-01-01T00:00:00",
            "commitHash": artifact.digest,
            "currentManifest": {"id": artifact.manifest, "file": file},
            "createdBy": self._creator(artifact),
            "usedBy": lambda a: self._edges(
                [self._run(r) for r in self.runs.values() if artifact.id in r.used]
            ),
        }

    def _creator(self, artifact: Artifact) -> dict[str, Any] | None:
        run = self.runs.get(artifact.run)
        project = self._project(run.project, None) if run else None
        return {"__typename": "Run", "name": run.name, "project": project} if run else None

    def fault(self, path: str, operation: str) -> Fault | None:
        if self.down:
            return Fault("", 0)
        for fault in self.faults:
            if re.search(fault.match, path) or (operation and re.search(fault.match, operation)):
                fault.seen += 1
                if fault.seen <= fault.times:
                    return fault
        return None


def _handler(server: WandbServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def _body(self) -> bytes:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

        def _send(self, status: int, body: bytes = b"{}", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                with contextlib.suppress(ConnectionError):  # the client may have been killed meanwhile
                    self.wfile.write(body)

        def _serve(self) -> None:
            path = unquote(urlsplit(self.path).path)
            body = self._body()
            server.payloads.append(f"{self.path}\n{self.headers}\n".encode() + body)
            query = json.loads(body) if path == "/graphql" and body else {}
            operation = Document(query["query"]).name if query else ""
            fault = server.fault(path, operation)
            if fault:
                self.close_connection = True
                if fault.status:
                    self._send(fault.status, b'{"error": "as the test wants it"}')
                return
            if query:
                try:
                    answer = json.dumps(server.graphql(query)).encode()
                except Exception as error:
                    server.unknown.add(f"{operation}: {type(error).__name__}: {error}")
                    self._send(400, json.dumps({"errors": [{"message": str(error)}]}).encode())
                    return
                self._send(200, answer)
            elif path.endswith("/file_stream"):
                self._send(
                    200, json.dumps(server.stream(path.split("/")[-2], json.loads(body or b"{}"))).encode()
                )
            elif path.startswith("/blobs/") and self.command == "PUT":
                server.blobs[path.removeprefix("/blobs/")] = body
                self._send(200, b"", ETag=hashlib.md5(body).hexdigest())
            elif path.startswith("/artifactsV2/"):
                self._blob("files/" + path.split("/")[-2])
            elif path.startswith("/blobs/"):
                self._blob(path.removeprefix("/blobs/"))
            elif path == "/":
                self._send(200)
            else:
                if "/otel/" not in path:
                    server.unknown.add(f"{self.command} {path}")
                self._send(404)

        def _blob(self, key: str) -> None:
            found = server.blobs.get(key)
            self._send(404 if found is None else 200, found or b"")

        do_GET = do_POST = do_PUT = do_HEAD = _serve

    return Handler


def running(server: WandbServer) -> Iterator[Run]:
    """The runs that a client has open."""
    return (run for run in server.runs.values() if run.state == "running")
