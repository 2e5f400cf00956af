"""The one place that talks to MLflow: a study is an experiment, each of its rows a run, found again by fingerprint."""

import contextlib
import hashlib
import json
import os
import posixpath
import socket
import tempfile
import textwrap
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipelines import artifact, storage
from pipelines.artifact import Artifact
from pipelines.config import Config
from pipelines.errors import Unfinished, UserError, shown


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
            self._client.update_run(self.id, "RUNNING")
        else:
            tags = {"cil.fingerprint": fingerprint, "cil.stage": stage, "mlflow.runName": name}
            self.id = self._client.create_run(experiment, tags=tags).info.run_id
        self._last: dict[str, int] = {}

    def parameters(self, values: dict[str, Any]) -> None:
        from mlflow.entities import Param

        self._client.log_batch(self.id, params=[Param(k, str(v)) for k, v in artifact.flat(values).items()])

    def tags(self, values: dict[str, Any]) -> None:
        for key, value in values.items():
            self._client.set_tag(self.id, f"cil.{key}", value)

    def metrics(self, values: dict[str, float], step: int = 0, at: int | None = None) -> None:
        """Each step has one point: what an earlier attempt has logged is not logged again. `at`: in milliseconds."""
        from mlflow.entities import Metric

        new = {name: value for name, value in values.items() if step > self._logged(name)}
        at = _now() if at is None else at
        self._client.log_batch(self.id, metrics=[Metric(name, value, at, step) for name, value in new.items()])
        self._last |= dict.fromkeys(new, step)

    def renew(self, name: str, value: float) -> None:
        """What may be another value later: that has a step of its own, and the last one counts."""
        points = sorted(self._client.get_metric_history(self.id, name), key=lambda point: int(point.step))
        if not points or points[-1].value != value:
            self.metrics({name: value}, points[-1].step + 1 if points else 0)

    def file(self, name: str, data: bytes) -> None:
        """`name`: folders and all, in the run's artifacts."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, posixpath.basename(name))
            path.write_bytes(data)
            self._client.log_artifact(self.id, str(path), posixpath.dirname(name) or None)

    def register(self, name: str, weights: Artifact, told: dict[str, Any]) -> None:
        """In the model registry by URI and digest: nothing is copied. Once, whatever is run again.

        `told` of them: counts, and `files`, the SHA-256 of each.
        """
        from mlflow.exceptions import MlflowException

        with contextlib.suppress(MlflowException):  # it is there already
            self._client.create_registered_model(name)
        same = f"tags.`cil.fingerprint` = '{weights.fingerprint}'"
        if not self._client.search_model_versions(f"name = '{name}' and {same}"):
            card = {"uri": weights.uri, "fingerprint": weights.fingerprint, **weights.identity, **told}
            self.file("model/card.json", json.dumps(card, indent=1).encode())
            digest = hashlib.sha256(json.dumps(told["files"], sort_keys=True).encode()).hexdigest()
            tags = {"cil.fingerprint": weights.fingerprint, "cil.uri": weights.uri, "cil.sha256": digest}
            self._client.create_model_version(name, f"runs:/{self.id}/model", self.id, tags=tags)

    def finish(self, status: str = "FINISHED") -> None:
        self._client.set_terminated(self.id, status)

    def _logged(self, name: str) -> int:
        if name not in self._last:
            self._last[name] = max((m.step for m in self._client.get_metric_history(self.id, name)), default=-1)
        return self._last[name]


class Feed:
    """A run that is told from a loop which never waits: a thread sends, and tries again while the server is away."""

    LONGEST = 15  # seconds between two attempts

    def __init__(self, config: Config, name: str, stage: str, fingerprint: str) -> None:
        _be_brief()
        self._open = lambda: Run(config, name, stage, fingerprint)
        self._waiting: deque[tuple[str, tuple[Any, ...]]] = deque()
        self._changed = threading.Condition()
        self.problem = ""  # why nothing can be sent now
        threading.Thread(target=self._send, daemon=True).start()

    def parameters(self, values: dict[str, Any]) -> None:
        self._tell("parameters", values)

    def tags(self, values: dict[str, Any]) -> None:
        self._tell("tags", values)

    def metrics(self, values: dict[str, float], step: int) -> None:
        self._tell("metrics", values, step, _now())

    def file(self, name: str, data: bytes) -> None:
        self._tell("file", name, data)

    def register(self, name: str, weights: Artifact, told: dict[str, Any]) -> None:
        self._tell("register", name, weights, told)

    def again(self, unsent: list[Any]) -> None:
        """Points that an earlier attempt could not send."""
        for told in unsent:
            self._tell("metrics", *told)

    def unsent(self) -> list[Any]:
        with self._changed:
            return [list(told) for what, told in self._waiting if what == "metrics"]

    def flush(self, patience: float = 1800) -> None:
        """Returns when all is sent; a server that has gone is waited for."""
        end = time.monotonic() + patience
        with self._changed:
            while self._waiting:
                if time.monotonic() > end:
                    raise Unfinished(f"the tracking server cannot be reached ({self.problem})")
                self._changed.wait(1)

    def finish(self, status: str = "FINISHED") -> None:
        self._tell("finish", status)

    def _tell(self, what: str, *told: Any) -> None:
        with self._changed:
            self._waiting.append((what, told))
            self._changed.notify_all()

    def _send(self) -> None:
        run: Run | None = None
        pause = 1.0
        while True:
            with self._changed:
                while not self._waiting:
                    self._changed.wait()
                what, told = self._waiting[0]
            try:
                run = run or self._open()
                getattr(run, what)(*told)
            except Exception as error:  # MLflow's, its server's, SQLAlchemy's: whatever it is, training goes on
                if getattr(error, "error_code", "") == "INVALID_PARAMETER_VALUE":  # it never will be valid
                    print(f"tracking: {what} is left out: {_one_line(error)}", flush=True)
                    self._sent()
                    continue
                if not self.problem:
                    print(f"tracking: {_one_line(error)}; tried again until it works", flush=True)
                self.problem = _one_line(error)
                run = None  # what it knew may be wrong: the server can have done what it did not say
                time.sleep(pause)
                pause = min(2 * pause, self.LONGEST)
                continue
            self.problem, pause = "", 1.0
            self._sent()

    def _sent(self) -> None:
        with self._changed:
            self._waiting.popleft()
            self._changed.notify_all()


class SystemMetrics:
    """MLflow's own, of this machine, but at the points of a training's curve: told by a Feed, none of them is lost."""

    def __init__(self) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self._monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with contextlib.suppress(ImportError, RuntimeError):  # there is no GPU here
            self._monitors.append(GPUMonitor())

    def take(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for monitor in self._monitors:
            with contextlib.suppress(Exception):  # no network, a busy driver: no reason to stop a training
                monitor.collect_metrics()
                values |= {f"system/{name}": value for name, value in monitor.aggregate_metrics().items()}
                monitor.clear_metrics()
        return values


def _be_brief() -> None:
    """Else one call of MLflow's client may take a quarter of an hour to fail."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")


def _now() -> int:
    return int(time.time() * 1000)


def _one_line(error: Exception) -> str:
    told = " ".join(f"{type(error).__name__}: {error}".split())
    return textwrap.shorten(shown(told), 300, placeholder=" ...")


def refuse_unreachable(config: Config) -> None:
    """In seconds, where MLflow's own client tries for minutes. A store in a file is there, or will be made."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    uri = store_uri(config)
    if uri.startswith("sqlite:"):
        return
    refuse_silent(config)
    try:
        MlflowClient(uri).search_experiments(max_results=1)
    except (MlflowException, SQLAlchemyError, ImportError) as error:
        if _away(error) or isinstance(error, SQLAlchemyError):
            raise Unfinished(f"tracking.uri={uri}: does not answer ({_one_line(error)})") from None
        raise UserError(f"tracking.uri={uri}: {_one_line(error)}") from None


@contextlib.contextmanager
def answering(config: Config) -> Iterator[None]:
    """A store that goes away while it is read or told costs this attempt, and is one line."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    _be_brief()
    try:
        yield
    except (MlflowException, RequestException, SQLAlchemyError) as error:
        kept = "what is made stays, and the same command goes on when the store answers"
        raise Unfinished(f"tracking.uri={store_uri(config)}: {_one_line(error)}; {kept}") from None


def _away(error: Exception) -> bool:
    """Whether a server did not answer at all, or not to its end: MLflow says so in words alone."""
    return isinstance(error.__cause__ or error.__context__, OSError)


def refuse_silent(config: Config) -> None:
    """A server, or a database, that nobody runs."""
    try:
        parts = urlsplit(store_uri(config))
        port = parts.port or PORTS.get(parts.scheme.partition("+")[0])
    except ValueError as error:
        raise UserError(f"tracking.uri={config.tracking.uri}: is no address ({error})") from None
    _be_brief()
    if not parts.hostname or not port:
        return
    try:
        socket.create_connection((parts.hostname, port), timeout=5).close()
    except OSError as error:
        raise Unfinished(f"tracking.uri={config.tracking.uri}: cannot be reached ({error})") from None


PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}


def open_study(config: Config) -> tuple[Any, str]:
    """An MLflow client, and the id of the study's experiment."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    uri, name = store_uri(config), config.tracking.experiment
    file = uri.removeprefix("sqlite:///")
    if file != uri and not storage.exists(file):
        _make_store(Path(file))
    client = MlflowClient(uri)
    if client.get_experiment_by_name(name) is None:
        there = storage.join(config.out, "mlartifacts")
        beside = f"file://{there}" if storage.is_local(there) else there
        location = beside if uri.startswith("sqlite:") else None
        with contextlib.suppress(MlflowException):  # somebody else may make it at the same time
            client.create_experiment(name, artifact_location=location)
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    return client, experiment.experiment_id


def _make_store(file: Path) -> None:
    """Whole or not at all, as MLflow refuses one whose making was killed. If others make it too, the first one's stays,
    with the runs that are in it by then.
    """
    from mlflow import MlflowClient

    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".unfinished-") as folder:
        made = Path(folder, file.name)
        MlflowClient(f"sqlite:///{made}").search_experiments()
        try:
            os.link(made, file)
        except FileExistsError:
            pass
        except OSError:  # a disk without hard links: only of runs that begin in the same second one could be lost
            made.replace(file)


def runs(config: Config, stage: str) -> list[Any]:
    """The study's runs of this stage, newest first."""
    client, experiment = open_study(config)
    return list(client.search_runs([experiment], f"tags.`cil.stage` = '{stage}'", max_results=5000))


def search(config: Config, experiment: str, matching: str) -> list[Any]:
    """The runs of an experiment, whoever made them, that match a filter as MLflow writes them."""
    from mlflow.exceptions import MlflowException

    client = _existing(config)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        there = ", ".join(sorted(e.name for e in client.search_experiments())[:8])
        raise UserError(f"compare.experiment={experiment}: {store_uri(config)} has no such experiment, but {there}")
    try:
        return list(client.search_runs([found.experiment_id], matching, max_results=5000))
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        raise UserError(f"compare.filter={matching}: {_one_line(error)}") from None


def run_of(config: Config, known_by: str, notes: list[str]) -> Any | None:
    """A run by its id, in any experiment."""
    from mlflow.exceptions import MlflowException

    try:
        return _existing(config).get_run(known_by)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        notes.append(f"{known_by}: {store_uri(config)} has no such run; it is left out.")
        return None


def beside(config: Config, found: list[Any], stage: str) -> list[Any]:
    """The runs of this stage in the experiments that these are in."""
    experiments = sorted({run.info.experiment_id for run in found})
    return list(_existing(config).search_runs(experiments, f"tags.`cil.stage` = '{stage}'", max_results=5000))


def experiments(config: Config, found: list[Any]) -> list[str]:
    """The names of those that these runs are in."""
    client = _existing(config)
    return sorted({client.get_experiment(known_by).name for known_by in {run.info.experiment_id for run in found}})


def read_file(config: Config, run: Any, name: str) -> bytes | None:
    """Of a run's artifacts; None where there is none of that name, or no way to them from here."""
    from mlflow.exceptions import MlflowException

    client = _existing(config)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    try:
        with tempfile.TemporaryDirectory() as folder:
            if any(file.path == name for file in client.list_artifacts(run.info.run_id)):
                return Path(client.download_artifacts(run.info.run_id, name, folder)).read_bytes()
    except Exception as error:  # whoever keeps them, in their words
        if isinstance(error, MlflowException) and _away(error):
            raise  # it would be there if the server were
    return None


def _existing(config: Config) -> Any:
    """A client of a store that is not made by being looked at."""
    from mlflow import MlflowClient

    refuse_absent(config)
    return MlflowClient(store_uri(config))


def refuse_absent(config: Config) -> None:
    """A store of which something is to be read."""
    uri = store_uri(config)
    file = uri.removeprefix("sqlite:///")
    if file != uri and not storage.exists(file):
        raise UserError(f"{uri}: there is no such tracking store; run jobs.score first, or name it in tracking.uri")
    refuse_silent(config)
