"""`cil submit NAME ...`: has a Ray cluster run a job, once, however often the same command is given.

    cil submit finetune --config jobs/configs/paper.yaml out=/shared/run1 --follow

The configuration is checked here, by the job itself, before anything is sent. docs/submitting.md says more.
"""

import argparse
import asyncio
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipelines.command import STOPPED, ending
from pipelines.errors import Unfinished, UserError, shown
from pipelines.secrets import NAME, tells_secret

SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # by which a job knows that it was
TOKEN = (
    "the cluster wants its token: ask its operator (who reads it by `ray get-auth-token` on the head node, or from the "
    "Secret of a KubeRay cluster), then set RAY_AUTH_TOKEN, or put it into ~/.ray/auth_token"
)
OF_THE_MOMENT = ("doctor", "show_cache")  # what they have said once is no answer later
STARTING = 60  # seconds in which a head node that has just started may have no agent yet
AWAY = 300  # seconds for which a dashboard that does not answer is asked again for the log


def main(arguments: Sequence[str], jobs: Sequence[str]) -> None:
    with ending("submit"):
        options, rest = _parse(arguments, jobs)
        code = submit(options, rest)
    sys.exit(code)


def _parse(arguments: Sequence[str], jobs: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="cil submit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("job", metavar="NAME", choices=jobs, help=f"one of {', '.join(jobs)}")
    parser.add_argument("--config", metavar="FILE", help="the job's, in this folder, which is what is sent")
    parser.add_argument("--address", help="of the cluster: http://HOST:8265; default: RAY_API_SERVER_ADDRESS, or local")
    parser.add_argument("--follow", action="store_true", help="print the job's log, and end with its exit code")
    parser.add_argument("--again", action="store_true", help="even if this very job has succeeded, or runs")
    parser.add_argument("--runtime-env", metavar="FILE", help="what the nodes lack, such as infra/runtime-env.yaml")
    for name, kind in (("num-cpus", float), ("num-gpus", float), ("memory", int)):
        parser.add_argument(f"--entrypoint-{name}", type=kind, metavar="N", help="that the job itself is to have")
    parser.add_argument("--entrypoint-resources", type=json.loads, metavar="JSON", help='of the cluster: {"head": 1}')
    parser.epilog = "All other arguments are the job's: key=value, and its own flags."
    options, rest = parser.parse_known_args(arguments)
    return options, [*_config(options.config), *rest]


def _config(file: str | None) -> list[str]:
    """As the job is to find it in the folder that is sent."""
    if file is None:
        return []
    path = Path(file).resolve()
    if not path.is_relative_to(Path.cwd()):
        raise UserError(f"--config {file}: only what is in {Path.cwd()} is sent with the job; copy it there")
    return ["--config", str(path.relative_to(Path.cwd()))]


def submit(options: argparse.Namespace, arguments: list[str]) -> int:
    """Sends the job unless the cluster has it already; the exit code."""
    if not Path("jobs", f"{options.job}.py").is_file():
        raise UserError(
            f"{Path.cwd()}: no jobs/{options.job}.py in this folder, which would be sent; run from the repository"
        )
    config = checked(options.job, arguments)
    runtime = _runtime_env(options.runtime_env)
    entrypoint = ["python", "-m", f"jobs.{options.job}", *arguments]
    refuse_secrets(entrypoint)
    client = _client(options.address)
    asked = {
        "entrypoint": shlex.join(entrypoint),
        "runtime_env": runtime | {"working_dir": "."},
        "metadata": {
            "job": options.job,
            "study": config["tracking"]["experiment"],
            "out": shown(config["out"]),
        },
        "entrypoint_num_cpus": options.entrypoint_num_cpus,
        "entrypoint_num_gpus": options.entrypoint_num_gpus,
        "entrypoint_memory": options.entrypoint_memory,
        "entrypoint_resources": options.entrypoint_resources,
    }
    known_by = _sent(client, identity(options.job, config), asked, options.again)
    if options.follow:
        return _follow(client, known_by)
    print(f"submit: `ray job logs -f {known_by}` shows its log, `ray job stop {known_by}` stops it")
    return 0


def checked(job: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The whole configuration, as the job will read it: by the job itself, which ends here if it is wrong."""
    command = [sys.executable, "-m", f"jobs.{job}", *arguments, "--check"]
    done = subprocess.run(command, env=os.environ | {SUBMITTED: "{}"}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    config: dict[str, Any] = json.loads(done.stdout)
    return config


def identity(job: str, config: dict[str, Any]) -> str:
    """The id of a job's first submission: the same for the same configuration, `out` and all."""
    from pipelines.artifact import fingerprint

    return f"{job}-{fingerprint(config)}"


def refuse_secrets(entrypoint: Sequence[str]) -> None:
    """Everybody who may look at the cluster's jobs sees it."""
    for word in entrypoint:
        if re.search(r"://[^/\s?'\"]*@|://[^\s?'\"]*\?[^\s=?'\"]+=", word):
            key = word.partition("=")[0]
            raise UserError(
                f"{key}: a URL with a user, a password or a signature, which everybody who sees the cluster's jobs "
                "would see; give it in the environment of the nodes"
            )


def _runtime_env(file: str | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        told = yaml.safe_load(Path(file).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--runtime-env {file}: cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(told, dict):
        raise UserError(f"--runtime-env {file}: expected Ray's runtime_env, such as infra/runtime-env.yaml")
    for name, value in _leaves(told):
        if NAME.search(name) or tells_secret(value):
            raise UserError(
                f"--runtime-env {file}: {shown(name)} would be kept with the job, for all to read; "
                "give it in the environment of the nodes"
            )
    return told


def _leaves(tree: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Each value with its name, such as env_vars.HOME."""
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _leaves(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, str(tree)


# -- the cluster -------------------------------------------------------------------------------------------------------


def _client(address: str | None) -> Any:
    """With the token where there is one, and a way out where there is none."""
    if address:
        os.environ["RAY_API_SERVER_ADDRESS"] = address  # which Ray prefers to what it is told
    os.environ.setdefault("RAY_AUTH_MODE", "token" if _has_token() else "disabled")
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in ("ray", "ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk"):
        logging.getLogger(name).setLevel(logging.ERROR)  # they tell of every file and of every package
    asked = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    try:
        return JobSubmissionClient()
    except AuthenticationError as error:
        refused = "" if "required" in str(error) else "this token is not the cluster's; "
        raise UserError(f"{asked or 'the cluster'}: {refused}{TOKEN}") from None
    except Exception as error:  # ConnectionError, requests' own, Ray's RuntimeError: as its versions have it
        if asked:
            raise Unfinished(f"{shown(asked)}: no Ray dashboard answers there ({_line(error)})") from None
        raise UserError(
            "no Ray cluster runs here: name one by --address http://HOST:8265, or in RAY_API_SERVER_ADDRESS"
        ) from None


def _has_token() -> bool:
    """In one of the three places where Ray looks."""
    file = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token"
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or Path(file).is_file()


def _sent(client: Any, first: str, asked: dict[str, Any], again: bool) -> str:
    """The id by which the cluster has the job: that of an earlier submission, or of a new one."""
    end = time.monotonic() + STARTING
    while True:
        try:
            found = client.list_jobs()
        except RuntimeError as error:  # the head is about to go, or to come
            if time.monotonic() > end:
                raise Unfinished(f"the cluster does not say which jobs it has: {_line(error)}; try again") from None
            time.sleep(1)
            continue
        before = (job for job in found if _number(job.submission_id, first))
        last = max(before, key=lambda job: _number(job.submission_id, first), default=None)
        if last and not again:
            if not last.status.is_terminal():
                print(f"submit: {last.submission_id} is {last.status.value.lower()} already", flush=True)
                return str(last.submission_id)
            if last.status == "SUCCEEDED" and not first.startswith(OF_THE_MOMENT):
                print(f"submit: {last.submission_id} has succeeded already; --again runs it once more", flush=True)
                return str(last.submission_id)
        number = _number(last.submission_id, first) + 1 if last else 1
        known_by = first if number == 1 else f"{first}-{number}"
        try:
            client.submit_job(submission_id=known_by, **asked)
        except ValueError as error:
            raise UserError(f"the folder {Path.cwd()} cannot be sent: {_line(error)}") from None
        except RuntimeError as error:
            # Another command may have been faster; a head node takes jobs some seconds after it says that it runs.
            if time.monotonic() > end or not re.search("already (been used|exists)|agent", str(error)):
                raise Unfinished(f"the cluster did not take the job: {_line(error)}") from None
            time.sleep(1)
            continue
        after = f", as {last.submission_id} {_ended(last)}" if last else ""
        print(f"submit: {known_by} is submitted{after}", flush=True)
        return known_by


def _number(id: str | None, first: str) -> int:
    """Of a submission of the same job: 1, 2 ...; 0 for any other."""
    found = re.fullmatch(rf"{re.escape(first)}(?:-(\d+))?", id or "")
    return int(found[1] or 1) if found else 0


def _follow(client: Any, known_by: str) -> int:
    """Prints the log to its end; the job's own exit code."""
    printed, away = 0, 0.0

    async def print_log() -> None:
        """It always comes from its beginning: what has been printed is passed over."""
        nonlocal printed
        told = 0
        async for text in client.tail_job_logs(known_by):
            print(text[max(0, printed - told) :], end="", flush=True)
            told += len(text)
            printed = max(printed, told)

    while True:
        try:
            asyncio.run(print_log())
            info, away = client.get_job_info(known_by), 0.0
        except BrokenPipeError:  # nobody reads what is printed
            raise
        except Exception as error:  # the connection broke, in aiohttp's words or in Ray's
            away = away or time.monotonic()
            if time.monotonic() - away > AWAY:
                raise Unfinished(
                    f"{known_by}: the dashboard does not answer ({_line(error)}); the job may go on"
                ) from None
        else:
            if info.status.is_terminal():
                break
        time.sleep(1)
    print(f"submit: {known_by} {_ended(info)}", flush=True)
    return {"SUCCEEDED": 0, "STOPPED": STOPPED}.get(info.status.value, info.driver_exit_code or 1)


def _ended(info: Any) -> str:
    if info.status == "SUCCEEDED":
        return "succeeded"
    if info.status == "STOPPED":
        return "was stopped; the same command goes on"
    if info.driver_exit_code:
        return f"failed with exit code {info.driver_exit_code}"
    return f"failed before it began, or was lost ({_line(info.message)})"


def _line(error: object) -> str:
    return shown(" ".join(str(error).split())[:300])
