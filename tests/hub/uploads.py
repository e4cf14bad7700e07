"""The writing half of the loopback hub: creating repositories, uploading files, committing, as `HfApi` asks for it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.hub.server import LoopbackHub

Answer = tuple[int, dict[str, Any]]
REGULAR_BYTES = 2048  # larger files are uploaded on their own, as LFS files are
_CALL = re.compile(r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)/(?P<verb>preupload|commit)/(?P<revision>.+)")
_LFS = re.compile(r"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch")


def take(hub: LoopbackHub, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Answer | None:
    """The answer to a request that writes; None for any other request."""
    call, lfs = _CALL.fullmatch(path), _LFS.fullmatch(path)
    upload = path.startswith("/upload/") and method == "PUT"
    if not (upload or (method == "POST" and (call or lfs or path in ("/api/repos/create", "/api/validate-yaml")))):
        return None
    if path == "/api/validate-yaml":  # the head of a README; the real hub looks at it
        return 200, {"errors": [], "warnings": []}
    if upload:  # its address is the permission
        digest = hashlib.sha256(body).hexdigest()
        if path != f"/upload/{digest}":
            return 400, {"error": "the bytes are not those that were announced"}
        hub.blobs[digest] = body
        return 200, {}
    if not headers.get("Authorization", "").startswith("Bearer "):
        return 401, {"error": "log in first"}
    if path == "/api/repos/create":
        return _create(hub, json.loads(body))
    if lfs:
        return 200, {"transfer": "basic", "objects": [_place(hub, wanted) for wanted in json.loads(body)["objects"]]}
    assert call is not None
    kind, name = call["kind"].removesuffix("s"), call["name"]
    if (kind, name) not in hub.repositories:
        return 404, {"error": "Repository not found"}
    if call["verb"] == "preupload":
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["size"] > REGULAR_BYTES else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        return 200, {"files": modes}
    return _commit(hub, kind, name, [json.loads(line) for line in body.splitlines()])


def _create(hub: LoopbackHub, asked: dict[str, Any]) -> Answer:
    name, kind = f"{asked.get('organization') or 'me'}/{asked['name']}", asked.get("type") or "model"
    about = {"url": f"{hub.url}/{'datasets/' if kind == 'dataset' else ''}{name}", "name": name}
    if (kind, name) in hub.repositories:
        return 409, {**about, "error": "You already created this repo"}
    hub.publish(name, {}, kind=kind)
    if asked.get("private") or asked.get("visibility") == "private":
        hub.private.add(name)
    return 200, about


def _place(hub: LoopbackHub, wanted: dict[str, Any]) -> dict[str, Any]:
    about = {"oid": wanted["oid"], "size": wanted["size"], "authenticated": True}
    if wanted["oid"] in hub.blobs:
        return about
    return {**about, "actions": {"upload": {"href": f"{hub.cdn}/upload/{wanted['oid']}", "header": {}}}}


def _commit(hub: LoopbackHub, kind: str, name: str, operations: list[dict[str, Any]]) -> Answer:
    files = dict(list(hub.repositories[kind, name].commits.values())[-1])
    for operation in operations:
        value = operation["value"]
        if operation["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif operation["key"] == "lfsFile":
            if value["oid"] not in hub.blobs:
                return 400, {"error": f"{value['path']} was not uploaded"}
            files[value["path"]] = hub.blobs[value["oid"]]
        elif operation["key"] == "deletedFile":
            files.pop(value["path"], None)
    sha = hub.publish(name, files, kind=kind)
    front = "datasets/" if kind == "dataset" else ""
    return 200, {"success": True, "commitOid": sha, "commitUrl": f"{hub.url}/{front}{name}/commit/{sha}"}
