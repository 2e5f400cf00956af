"""infra/kubernetes: objects that Kubernetes and KubeRay take, with commands that our jobs take."""

import copy
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from pipelines import command
from pipelines.config import Config

ROOT = Path(__file__).parents[2]
CRDS = ROOT.parent / "shared/kuberay"
IMAGE = "/opt/cil"  # where infra/Dockerfile puts the repository
SECRET = re.compile("PASS|SECRET|TOKEN|KEY|AUTH")
MADE = {
    f"{path.relative_to(ROOT)}#{number}": made
    for path in sorted((ROOT / "infra/kubernetes").rglob("*.yaml"))
    for number, made in enumerate(yaml.safe_load_all(path.read_text()))
}
RAYS = {name: made for name, made in MADE.items() if made["apiVersion"] == "ray.io/v1"}
JOBS = {name: made for name, made in RAYS.items() if made["kind"] == "RayJob"}
PINNED = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)


def cluster_of(made: dict[str, Any]) -> dict[str, Any]:
    return made["spec"] if made["kind"] == "RayCluster" else made["spec"]["rayClusterSpec"]


def pods_of(made: Any) -> Iterator[dict[str, Any]]:
    """The specifications of pods, wherever they stand in it."""
    if isinstance(made, dict) and "containers" in made:
        yield made
    for inner in made.values() if isinstance(made, dict) else made if isinstance(made, list) else ():
        yield from pods_of(inner)


# -- schemas -----------------------------------------------------------------------------------------------------------


def closed(schema: Any) -> Any:
    """The same, refusing the fields that Kubernetes would drop without a word."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items() if key != "properties"}
    if "properties" in schema:
        made["properties"] = {name: closed(inner) for name, inner in schema["properties"].items()}
    free = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    return made if schema.get("type") != "object" or free else made | {"additionalProperties": False}


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    if not CRDS.is_dir():
        pytest.skip(f"{CRDS} is not there: KubeRay's schemas are looked up in it")
    found = {}
    for path in CRDS.glob("*.yaml"):
        definition = yaml.load(path.read_text(), yaml.CSafeLoader)["spec"]
        (version,) = (each for each in definition["versions"] if each["name"] == "v1")
        schema = closed(version["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes checks it itself
        found[definition["names"]["kind"]] = schema
    return found


def problems(schemas: dict[str, Any], made: dict[str, Any]) -> list[str]:
    found = jsonschema.Draft202012Validator(schemas[made["kind"]]).iter_errors(made)
    return [f"{error.json_path}: {error.message}" for error in found]


@pytest.mark.parametrize("name", RAYS)
def test_kuberay_knows_every_field(name, schemas):
    assert not problems(schemas, RAYS[name])


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("spec.shutdownAfterJobFinish", True),
        ("spec.rayClusterSpec.authOptions.mode", "none"),
        ("spec.rayClusterSpec.headGroupSpec.template.metadata.label", {"a": "b"}),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.securityContext.runAsNobody", True),
        ("spec.backoffLimit", "three"),
    ],
)
def test_a_field_that_kuberay_does_not_know_is_found(place, value, schemas):
    job = copy.deepcopy(JOBS["infra/kubernetes/jobs/finetune.yaml#0"])
    *folders, last = place.split(".")
    inner = job
    for folder in folders:
        inner = inner.setdefault(folder, {})
    inner[last] = value
    assert problems(schemas, job)


@pytest.mark.parametrize("name", [name for name in MADE if name not in RAYS])
def test_kubernetes_knows_every_field(name):
    kubernetes_validate.validate(MADE[name], "1.37", strict=True)


def test_a_field_that_kubernetes_does_not_know_is_found():
    service = copy.deepcopy(MADE["infra/kubernetes/services/redis.yaml#0"])
    service["spec"]["selectors"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="selectors"):
        kubernetes_validate.validate(service, "1.37", strict=True)


# -- commands ----------------------------------------------------------------------------------------------------------


class Parsed(BaseException):
    pass


def parsed(line: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Config]:
    """A command that is submitted, by the job's own parser: its name and its configuration."""
    python, flag, module, *arguments = shlex.split(line.replace(f" {IMAGE}/", f" {ROOT}/"))
    assert (python, flag) == ("python", "-m")
    load = command.load

    def stop(*told: Any) -> Config:
        raise Parsed(load(*told))

    with monkeypatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(command, "load", stop)
        patch.setattr(sys, "argv", [module, *arguments])
        patch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")  # as in a submitted job: relative paths are refused
        with pytest.raises(Parsed) as found:
            runpy.run_module(module, run_name="__main__")
    return module.removeprefix("jobs."), found.value.args[0]


def commands_of(job: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Config]]:
    return [parsed(line, monkeypatch) for line in job["spec"]["entrypoint"].split("&&")]


@pytest.mark.parametrize("name", JOBS)
def test_jobs_take_their_commands_and_share_what_they_make(name, monkeypatch):
    found = [config for _, config in commands_of(JOBS[name], monkeypatch)]
    assert {config.out for config in found} == {"s3://cil/svd"}
    assert len({config.family for config in found}) == 1


def test_a_key_that_was_renamed_is_found(monkeypatch):
    job = copy.deepcopy(JOBS["infra/kubernetes/jobs/finetune.yaml#0"])
    job["spec"]["entrypoint"] = job["spec"]["entrypoint"].replace("finetune.workers", "finetune.gpus")
    with pytest.raises(SystemExit) as end:
        commands_of(job, monkeypatch)
    assert end.value.code == 2


def test_the_page_s_commands_are_taken(monkeypatch):
    page = (ROOT / "docs/clusters.md").read_text().replace("\\\n", " ")
    submitted = re.findall(r"^    ray job submit .* -- (python -m jobs.*)$", page, re.MULTILINE)
    assert submitted
    for line in submitted:
        parsed(line, monkeypatch)
    for file in re.findall(r"(?:infra|jobs|docs)/[\w./-]+\w", page):
        assert (ROOT / file).exists() or file == "infra/.env", file


@pytest.mark.parametrize("name", JOBS)
def test_jobs_ask_for_the_gpus_and_cpus_that_their_nodes_have(name, monkeypatch):
    groups = [each for each in cluster_of(JOBS[name])["workerGroupSpecs"] if each["replicas"]]
    (group,) = groups
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    gpus, cpus = int(limits["nvidia.com/gpu"]), int(limits["cpu"])
    for job, config in commands_of(JOBS[name], monkeypatch):
        if job == "build_cache":
            assert gpus / config.cache.gpus * (1 + config.cache.decoders) == cpus
        elif job == "finetune":
            assert config.finetune.workers == gpus * group["replicas"] == gpus * group["minReplicas"]
        elif job in ("generate", "score"):
            assert gpus / getattr(config, job).gpus <= cpus
        if job not in ("build_cache", "initial_noise"):
            assert config.tracking.uri == "http://mlflow.cil:5000"


QUANTITY = {"Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def bytes_of(quantity: str) -> int:
    return int(quantity[:-2]) * QUANTITY[quantity[-2:]]


def pods_of_ray(name: str) -> dict[str, dict[str, Any]]:
    """By the group; the head's is `head`."""
    cluster = cluster_of(RAYS[name])
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]} | {"head": cluster["headGroupSpec"]}
    return {group: spec["template"]["spec"] for group, spec in groups.items()}


@pytest.mark.parametrize("name", RAYS)
def test_nodes_have_a_fast_disk_and_shared_memory_that_is_counted(name):
    for pod in pods_of_ray(name).values():
        (container,) = pod["containers"]
        mounted = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
        volumes = {each["name"]: each["emptyDir"] for each in pod["volumes"]}
        disk, memory = volumes[mounted["/tmp"]], volumes[mounted["/dev/shm"]]
        assert "medium" not in disk
        assert bytes_of(disk["sizeLimit"]) >= 50 * 2**30
        assert memory["medium"] == "Memory"
        assert bytes_of(memory["sizeLimit"]) <= bytes_of(container["resources"]["limits"]["memory"]) / 2


def test_the_nodes_of_a_training_know_over_which_network_they_meet():
    for pod in pods_of_ray("infra/kubernetes/jobs/finetune.yaml#0").values():
        names = {variable["name"] for variable in pod["containers"][0]["env"]}
        assert {"NCCL_DEBUG", "NCCL_SOCKET_IFNAME"} <= names


@pytest.mark.parametrize("job", ["finetune", "evaluate"])
def test_gpus_are_given_to_a_job_all_at_once(job):
    made = JOBS[f"infra/kubernetes/jobs/{job}.yaml#0"]
    assert made["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "cil"}
    assert not cluster_of(made).get("enableInTreeAutoscaling")  # which would ask for nodes one by one
    for group in cluster_of(made)["workerGroupSpecs"]:
        assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]


def test_a_training_without_room_lets_go_what_it_holds():
    assert JOBS["infra/kubernetes/jobs/finetune.yaml#0"]["spec"]["preRunningDeadlineSeconds"] == 7200


@pytest.mark.parametrize("name", ["cluster.yaml#0", "jobs/build-cache.yaml#0"])
def test_nodes_come_and_go_by_the_work_that_there_is(name):
    cluster = cluster_of(RAYS[f"infra/kubernetes/{name}"])
    assert cluster["enableInTreeAutoscaling"]
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert groups.keys() == {"cpu", "gpu"}
    assert all(group["minReplicas"] == 0 < group["maxReplicas"] for group in groups.values())
    for group, spec in groups.items():
        asked = spec["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert ("nvidia.com/gpu" in asked) == (group == "gpu")


# -- safety ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MADE)
def test_no_pod_has_rights_that_it_does_not_need(name):
    for pod in pods_of(MADE[name]):
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert re.search(r":(\d|cil|cpu|cuda|mlflow)", container["image"])
            assert "memory" in container["resources"]["limits"]


@pytest.mark.parametrize("name", MADE)
def test_no_secret_stands_in_a_file(name):
    for pod in pods_of(MADE[name]):
        for variable in (each for container in pod["containers"] for each in container.get("env", ())):
            assert not SECRET.search(variable["name"]) or "secretKeyRef" in variable["valueFrom"]
    for options in (cluster_of(made).get("gcsFaultToleranceOptions") for made in RAYS.values()):
        assert not options or options["redisPassword"].keys() == {"valueFrom"}


@pytest.mark.parametrize("name", RAYS)
def test_clusters_ask_for_a_token_and_are_of_the_version_that_is_pinned(name):
    cluster = cluster_of(RAYS[name])
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == PINNED["ray"]
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    if cluster.get("enableInTreeAutoscaling"):
        rights = cluster["autoscalerOptions"]["securityContext"]
        assert rights == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


@pytest.mark.parametrize("name", JOBS)
def test_a_job_leaves_nothing_behind_and_is_tried_again(name):
    spec = JOBS[name]["spec"]
    assert spec["submissionMode"] == "K8sJobMode"
    assert spec["shutdownAfterJobFinishes"]
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["backoffLimit"] > 0
    submitter = spec["submitterPodTemplate"]["metadata"]["labels"]
    assert submitter in [
        peer["podSelector"].get("matchLabels")
        for rule in MADE["infra/kubernetes/services/network.yaml#1"]["spec"]["ingress"]
        for peer in rule["from"]
        if "podSelector" in peer
    ]


def test_everything_that_listens_is_closed_but_to_those_who_need_it():
    policies = [made["spec"] for made in MADE.values() if made["kind"] == "NetworkPolicy"]
    assert {"podSelector": {}, "policyTypes": ["Ingress"]} in policies
    for service in (made for made in MADE.values() if made["kind"] == "Service"):
        (own,) = (each for each in policies if each["podSelector"].get("matchLabels") == service["spec"]["selector"])
        ports = [port["port"] for rule in own["ingress"] for port in rule["ports"]]
        assert ports == [port["port"] for port in service["spec"]["ports"]]
