"""An artifact is a folder at a URI, whole or absent: its manifest is written last, and a finished one never changes.

`plan.json` is written when the work begins. It keeps the identity of what is being made, so that a run with another
configuration never mixes with what an interrupted one left.
"""

import hashlib
import json
import subprocess
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from pipelines import storage
from pipelines.errors import UserError

SCHEMA_VERSION = 2
SOFTWARE = ("torch", "numpy", "ray", "av", "deepspeed", "pyarrow", "diffusers", "transformers")
ELSEWHERE = {"initial noise": "initial_noise.name"}  # what gives an artifact another place, if not `out`

Identity = dict[str, Any]


def fingerprint(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def code(*modules: str) -> str:
    """A digest of the modules that shape an artifact's content."""
    digest = hashlib.sha256()
    for name in modules:
        digest.update(Path(str(import_module(name).__file__)).read_bytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Manifest:
    uri: str
    kind: str
    fingerprint: str
    identity: Identity
    counts: dict[str, int]
    content: dict[str, Any]


class Artifact:
    """An artifact that a job is making, or has made before."""

    def __init__(self, uri: str, kind: str, identity: Identity) -> None:
        self.uri, self.kind = uri, kind
        self.identity = json.loads(json.dumps(identity))
        self.fingerprint: str = self._header()["fingerprint"]
        plan_uri = storage.join(uri, "plan.json")
        self._begun = storage.exists(plan_uri)
        if self._begun:
            self._refuse_other(_read_json(plan_uri))
        self.finished = storage.exists(storage.join(uri, "manifest.json"))

    def path(self, *names: str) -> str:
        return storage.join(self.uri, *names)

    def begin(self, configuration: str) -> None:
        """From here on the folder is this configuration's; called when all that can be refused has been."""
        if not self._begun:
            storage.write(self.path("plan.json"), json.dumps(self._header(), indent=1).encode())
        storage.write(self.path("config.json"), configuration.encode())

    def finish(self, counts: dict[str, int], **content: Any) -> Manifest:
        body = self._header() | {"counts": counts, "content": content, "software": versions()}
        storage.write(self.path("manifest.json"), json.dumps(body, indent=1).encode())
        self.finished = True
        return read_manifest(self.uri, self.kind)

    def manifest(self) -> Manifest:
        return read_manifest(self.uri, self.kind)

    def _header(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "schema_version": SCHEMA_VERSION,
            "fingerprint": fingerprint([self.kind, SCHEMA_VERSION, self.identity]),
            "identity": self.identity,
        }

    def _refuse_other(self, found: dict[str, Any]) -> None:
        if found["fingerprint"] == self.fingerprint:
            return
        then, now = flat(found["identity"]), flat(self.identity)
        keys = [key for key in sorted({*then, *now}) if then.get(key) != now.get(key)]
        why = "; ".join(f"{key} was {then.get(key)!r}, is {now.get(key)!r}" for key in keys[:4])
        if found["kind"] != self.kind:
            why = f"it is a {found['kind']}, not a {self.kind}"
        raise UserError(
            f"{self.uri} was made with another configuration ({why or 'another schema'}). "
            f"Set another {ELSEWHERE.get(self.kind, '`out`')}, or remove that folder"
        )


def read_manifest(uri: str, kind: str) -> Manifest:
    """The manifest of a finished artifact, refused in one line where there is none."""
    path = storage.join(uri, "manifest.json")
    if not storage.exists(path):
        refuse_unfinished(uri, kind)
    body = _read_json(path)
    if body["kind"] != kind or body["schema_version"] != SCHEMA_VERSION:
        found = f"{body['kind']}, schema {body['schema_version']}"
        raise UserError(f"{uri} holds a {found}; wanted is a {kind}, schema {SCHEMA_VERSION}")
    return Manifest(uri, kind, body["fingerprint"], body["identity"], body["counts"], body["content"])


def refuse_unfinished(uri: str, kind: str) -> NoReturn:
    state = "is unfinished" if storage.exists(storage.join(uri, "plan.json")) else "does not exist"
    raise UserError(f"the {kind} at {uri} {state}: run the job that makes it ({MADE_BY[kind]}) first")


MADE_BY = {
    "shapes": "jobs.make_shapes",
    "latent cache": "jobs.build_cache",
    "snapshot": "jobs.build_cache",
    "initial noise": "jobs.initial_noise",
    "weights": "jobs.finetune",
    "videos": "jobs.generate",
    "scores": "jobs.score",
    "leakage": "jobs.score",
    "feature net": "jobs.score",
    "comparison": "jobs.compare",
}


def _read_json(uri: str) -> dict[str, Any]:
    try:
        body = storage.read_json(uri)
    except ValueError as error:
        raise UserError(f"{uri} is damaged ({error}): remove its folder, and run the job that makes it again") from None
    if not isinstance(body, dict) or not {"kind", "schema_version", "fingerprint", "identity"} <= body.keys():
        raise UserError(f"{uri} is not one of ours: remove its folder, and run the job that makes it again")
    return body


def commit() -> dict[str, str]:
    """Of the working tree that this file is in, if it is in one; `-dirty` where something was changed since."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # or it is installed in somebody else's tree
        return {"commit": git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")}
    except (OSError, subprocess.CalledProcessError):
        return {}


def versions() -> dict[str, str]:
    return {name: _version(name) for name in SOFTWARE}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """By dotted keys."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for name, sub in tree.items() for k, v in flat(sub, f"{prefix}.{name}" if prefix else name).items()}
