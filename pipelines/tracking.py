"""The one place that talks to MLflow: a study is an experiment, each of its rows a run, found again by fingerprint."""

import contextlib
import os
import socket
import time
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import urlsplit

from pipelines import storage
from pipelines.config import Config
from pipelines.errors import UserError


def store_uri(config: Config) -> str:
    """The tracking server, or a SQLite store beside the artifacts."""
    if config.tracking.uri:
        return config.tracking.uri
    if not storage.is_local(config.out):
        raise UserError(
            f"tracking.uri: with out={config.out} name an MLflow server; a SQLite store must be a local file"
        )
    return f"sqlite:///{storage.join(config.out, 'mlflow.db')}"


class Run:
    """One run of a study: opened anew, or taken up where an earlier attempt left it."""

    def __init__(self, config: Config, name: str, stage: str, fingerprint: str) -> None:
        self._client, experiment = open_study(config)
        same = f"tags.`cil.fingerprint` = '{fingerprint}' and tags.`mlflow.runName` = '{name}'"
        found = self._client.search_runs([experiment], same)
        if found:
            self.id = found[0].info.run_id
        else:
            tags = {"cil.fingerprint": fingerprint, "cil.stage": stage, "mlflow.runName": name}
            self.id = self._client.create_run(experiment, tags=tags).info.run_id
        self._last: dict[str, int] = {}

    def parameters(self, values: dict[str, Any]) -> None:
        from mlflow.entities import Param

        self._client.log_batch(self.id, params=[Param(k, str(v)) for k, v in _flat(values)])

    def tags(self, values: dict[str, Any]) -> None:
        for key, value in values.items():
            self._client.set_tag(self.id, f"cil.{key}", value)

    def metrics(self, values: dict[str, float], step: int = 0) -> None:
        """Each step has one point: what an earlier attempt logged already is not logged again."""
        from mlflow.entities import Metric

        new = {name: value for name, value in values.items() if step > self._logged(name)}
        now = int(time.time() * 1000)
        self._client.log_batch(self.id, metrics=[Metric(name, value, now, step) for name, value in new.items()])

    def text(self, name: str, text: str) -> None:
        self._client.log_text(self.id, text, name)

    def finish(self) -> None:
        self._client.set_terminated(self.id)

    def _logged(self, name: str) -> int:
        if name not in self._last:
            self._last[name] = max((m.step for m in self._client.get_metric_history(self.id, name)), default=-1)
        return self._last[name]


def refuse_unreachable(config: Config) -> None:
    """In seconds, where MLflow's own client tries for minutes."""
    parts = urlsplit(store_uri(config))
    if parts.scheme in ("http", "https"):
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        try:
            socket.create_connection((parts.hostname or "", port), timeout=5).close()
        except OSError as error:
            raise UserError(f"tracking.uri={config.tracking.uri}: cannot be reached ({error})") from None


@contextlib.contextmanager
def briefly() -> Iterator[None]:
    """MLflow's client gives up a request after seconds, where it would try for minutes."""
    limits = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    before = {name: os.environ.get(name) for name in limits}
    os.environ.update(limits)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def open_study(config: Config) -> tuple[Any, str]:
    """An MLflow client, and the id of the study's experiment."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    uri, name = store_uri(config), config.tracking.experiment
    client = MlflowClient(uri)
    if client.get_experiment_by_name(name) is None:
        location = f"file://{storage.join(config.out, 'mlartifacts')}" if uri.startswith("sqlite:") else None
        with contextlib.suppress(MlflowException):  # somebody else may make it at the same time
            client.create_experiment(name, artifact_location=location)
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    return client, experiment.experiment_id


def runs(config: Config, stage: str) -> list[Any]:
    """The study's runs of this stage, newest first."""
    client, experiment = open_study(config)
    return list(client.search_runs([experiment], f"tags.`cil.stage` = '{stage}'", max_results=5000))


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
