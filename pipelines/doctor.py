"""Checks of a cluster before hours are spent on it: every node is asked (pipelines/node.py), and its answers judged.

A check ends in lines: good, warning or failed, with what to do. One that crashes or hangs is a failed line.
"""

import json
import os
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pipelines import artifact, cluster, node, storage, tracking
from pipelines.config import Config
from pipelines.errors import UserError, shown
from pipelines.node import Answer, in_time, said

GIB = 2**30
SKEW, TOO_SKEWED = 2.0, 900.0  # seconds; S3 refuses requests that are a quarter of an hour off
FULL = 0.95  # of a disk: Ray makes no more objects then
LITTLE = 20 * GIB  # of a disk
SHARED = GIB  # of shared memory, which NCCL and the loaders of a node want
SLOW = {True: 1e9, False: 1e8}  # bytes a second of an all-reduce, by whether GPUs exchange
SHOWN = 4  # nodes of one line

State = Literal["good", "warning", "failed"]
Facts = Mapping[str, Mapping[str, Any]]  # of every node, by its address


class Finding(NamedTuple):
    state: State
    check: str
    found: str
    do: str = ""


def doctor(config: Config) -> None:
    """Prints what was found; a UserError if anything failed."""
    findings = examined(config)
    counts = {
        state: [each.check for each in findings if each.state == state] for state in ("good", "warning", "failed")
    }
    if config.doctor.as_json:
        print(json.dumps([{name: shown(told) for name, told in each._asdict().items()} for each in findings], indent=1))
    else:
        for each in findings:
            print(shown(f"{each.state:<8} {each.check}: {each.found}{each.do and f'; {each.do}'}"))
    if failed := counts["failed"]:
        raise UserError(f"{len(failed)} of {len(findings)} checks failed: {', '.join(dict.fromkeys(failed))}")
    if not config.doctor.as_json:
        print(f"doctor: nothing failed; {len(counts['good'])} good, {len(counts['warning'])} warnings")


def examined(config: Config) -> list[Finding]:
    import ray

    seconds = config.doctor.seconds
    try:
        _refuse_silent_cluster(os.environ.get("RAY_ADDRESS", ""))
        cluster.connect()
        nodes = {each["NodeID"]: each for each in ray.nodes() if each["Alive"]}
    except Exception as error:
        return [
            Finding("failed", "cluster", said(error), "is it up, and RAY_ADDRESS its address? `ray status` says more")
        ]
    gpu = cluster.gpus() > 0 if config.finetune.gpu is None else config.finetune.gpu
    places = places_of(config)
    there_before = storage.is_local(config.out) and Path(config.out).exists()
    names = _named(nodes)
    facts = _ask(nodes, names, config, places, gpu, seconds)
    findings = [Finding("good", "cluster", f"{len(nodes)} {_nodes(len(nodes))}"), *_silent(facts, names.values())]
    heard = {name: told for name, (told, _) in facts.items() if told}
    here = names[ray.get_runtime_context().get_node_id()]
    objects = {names[id]: each["Resources"].get("object_store_memory", 0) for id, each in nodes.items()}
    gpus = {names[id]: int(each["Resources"].get("GPU", 0)) for id, each in nodes.items()}
    findings += judged("versions", lambda known: versions(known, gpus, gpu), heard)
    findings += judged("code", code, heard)
    findings += judged("deepspeed", deepspeed, heard)
    findings += judged("gpus", lambda known: gpu_line(known, gpus), heard)
    findings += judged("machine", lambda known: machine(known, objects, gpus), heard)
    findings += clock({name: received - told["time"]["is"] for name, (told, received) in facts.items() if told})
    for key, uri in places.items():
        # A csv is read by the job itself, and no worker needs it.
        looked = {here: heard[here]} if key.startswith("catalog.csv") and here in heard else heard
        findings += judged(key, partial(place, key, uri), looked)
    findings += judged("out", partial(out, config.out), heard)
    if len(nodes) > 1 and storage.is_local(config.out):
        said_so = f"{config.out} is the same folder on all nodes"
        findings += _asked("shared out", lambda: cluster.refuse_unshared(config.out), said_so, seconds)
    findings += judged("tracking", lambda known: (), heard)
    findings += _asked("tracking", lambda: _tracking(config), f"{_store(config)} answers", seconds)
    findings += _asked("workers", lambda: _room(config, gpu), f"there is room for {config.finetune.workers}", seconds)
    findings += _asked("study", lambda: _study(config), "", seconds)
    findings += _asked("weights", lambda: weights(config), "", seconds)
    ranks = [id for id in nodes for _ in range(gpus[names[id]] if gpu else 1)]
    findings += _asked("all-reduce", lambda: exchange(ranks, len(nodes), gpu, seconds), "", 5 * seconds)
    if storage.is_local(config.out) and not there_before:
        storage.remove_folder(config.out)
    return findings


def _refuse_silent_cluster(address: str) -> None:
    """In seconds, where Ray's own client tries for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError as error:
            raise OSError(f"{address} cannot be reached ({error})") from None


# -- asking ------------------------------------------------------------------------------------------------------------


def places_of(config: Config) -> dict[str, str]:
    """What a configuration names beside `out`: every path in it is absolute by now, or s3://."""
    found: dict[str, str] = {}
    for key, value in artifact.flat(config.model_dump(mode="json", exclude={"out", "doctor"})).items():
        several = value if isinstance(value, list) else [value]
        uris = [each for each in several if isinstance(each, str) and each.startswith(("/", "s3://"))]
        found |= {key if len(uris) == 1 else f"{key}[{i}]": uri for i, uri in enumerate(uris)}
    return found


def _named(nodes: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """By their addresses, and where several nodes have one, by their ids too."""
    addresses = [each["NodeManagerAddress"] for each in nodes.values()]
    return {
        id: address if addresses.count(address) < 2 else f"{address} ({id[:6]})"
        for id, address in zip(nodes, addresses, strict=True)
    }


def _ask(
    nodes: Iterable[str], names: Mapping[str, str], config: Config, places: Mapping[str, str], gpu: bool, seconds: float
) -> dict[str, tuple[dict[str, Answer] | None, Any]]:
    """Of every node its answers and when they came, or nothing and why."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(node.answers)  # a node that is busy, or takes no work, answers too
    asked = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(id, soft=False)).remote(
            config, places, gpu, seconds
        ): names[id]
        for id in nodes
    }
    waiting, end = list(asked), time.monotonic() + 3 * seconds
    facts: dict[str, tuple[dict[str, Answer] | None, Any]] = {}
    while waiting:
        done, waiting = ray.wait(waiting, timeout=max(0, end - time.monotonic()))
        if not done:
            break
        received = time.time()
        for each in done:
            try:
                facts[asked[each]] = (ray.get(each), received)
            except Exception as error:
                facts[asked[each]] = (None, said(error))
    for each in waiting:
        ray.cancel(each, force=True)
        facts[asked[each]] = (None, f"no answer in {3 * seconds:g} s")
    return facts


def _silent(facts: Mapping[str, tuple[Any, Any]], names: Iterable[str]) -> Iterator[Finding]:
    for why, nodes in _by({name: facts[name][1] for name in names if facts[name][0] is None}):
        do = "is it lost, or without our code? submit with --working-dir, or have the code in the image"
        yield Finding("failed", "node", f"{_listed(nodes)}: {why}", do)


def judged(check: str, judge: Callable[[dict[str, Any]], Iterable[Finding]], facts: Facts) -> Iterator[Finding]:
    """What nodes could not answer failed; what they did is judged."""
    for why, nodes in _by({name: told[check]["problem"] for name, told in facts.items() if "problem" in told[check]}):
        yield Finding("failed", check, f"{_listed(nodes)}: {why}", ADVICE.get(check, ""))
    known = {name: told[check]["is"] for name, told in facts.items() if "is" in told[check]}
    if known:
        yield from judge(known)


ADVICE = {
    "versions": "use images of one state of the repository on all nodes",
    "deepspeed": "install it by constraints.txt, and g++ where CPUs train",
    "out": "give this user, or these credentials, the right to write, read and delete there",
    "tracking": "start the MLflow server, or open its port to this node",
}
READ = "name what is there, or give the nodes their credentials (AWS_ACCESS_KEY_ID ..., AWS_ENDPOINT_URL)"


def _asked(check: str, question: Callable[[], Any], good: str, seconds: float) -> list[Finding]:
    """Of this process: what it raises failed."""

    def whole() -> list[Finding]:
        found = question()
        return [Finding("good", check, good)] if found is None else list(found)

    answer = in_time({check: whole}, seconds)[check]
    return [Finding("failed", check, answer["problem"])] if "problem" in answer else answer["is"]


# -- judging -----------------------------------------------------------------------------------------------------------


def versions(known: Mapping[str, Mapping[str, str]], gpus: Mapping[str, int], wanted: bool) -> Iterator[Finding]:
    """CUDA's are those of the nodes with GPUs, if these are wanted: a head without has the image for CPUs."""
    everything = sorted({name for told in known.values() for name in told})
    with_gpus = {at: told for at, told in known.items() if gpus[at]} or known
    differ = False
    for name in everything:
        asked = with_gpus if name in ("cuda", "nccl") else known
        groups = _by({at: told.get(name, "none") for at, told in asked.items()})
        if len(groups) > 1:
            differ = True
            found = ", ".join(f"{version} on {_listed(nodes)}" for version, nodes in groups)
            yield Finding("failed", "versions", f"{name} {found}", ADVICE["versions"])
    if differ:
        return
    told = next(iter(with_gpus.values()))
    if wanted and any(gpus[at] for at in known) and told["cuda"] == "none":
        found = f"{_listed(list(with_gpus))}: PyTorch is a build for CPUs where Ray has GPUs"
        yield Finding("failed", "versions", found, "give nodes with GPUs the image for CUDA")
    else:
        yield Finding("good", "versions", ", ".join(f"{name} {told[name]}" for name in told))


def code(known: Mapping[str, str]) -> Iterator[Finding]:
    groups = _by(known)
    if len(groups) == 1:
        yield Finding("good", "code", f"{groups[0][0]} on every node")
        return
    found = ", ".join(f"{digest} on {_listed(nodes)}" for digest, nodes in groups)
    yield Finding("failed", "code", f"ours differs: {found}", "submit with --working-dir, or use one image")


def deepspeed(known: Mapping[str, str]) -> Iterator[Finding]:
    yield Finding(
        "good", "deepspeed", f"{', '.join(sorted(set(known.values())))} is imported, and can build what it needs"
    )


def gpu_line(known: Mapping[str, Sequence[Mapping[str, Any]]], in_ray: Mapping[str, int]) -> Iterator[Finding]:
    kinds = _by({at: _kind(found) for at, found in known.items()})
    told = ", ".join(f"{kind} on {_listed(nodes)}" for kind, nodes in kinds)
    lacking = [at for at, found in known.items() if len(found) < in_ray[at]]
    unused = [at for at, found in known.items() if len(found) > in_ray[at]]
    if lacking:
        do = "its driver, or the container's access to GPUs, is not in order (`nvidia-smi`)"
        yield Finding("failed", "gpus", f"{_listed(lacking)}: Ray has more GPUs there than the driver", do)
    if unused:
        do = "start them with --num-gpus, or in KubeRay with a limit of nvidia.com/gpu"
        yield Finding("warning", "gpus", f"{_listed(unused)}: Ray has fewer GPUs there than the driver", do)
    if len({each["name"] for found in known.values() for each in found}) > 1:
        yield Finding("warning", "gpus", told, "a training goes at the pace of the slowest kind")
    elif not lacking and not unused:
        yield Finding("good", "gpus", told)
    if busy := [at for at, found in known.items() if any(each["used"] > 0.1 * each["memory"] for each in found)]:
        yield Finding(
            "warning", "gpus", f"{_listed(busy)}: others use more than a tenth of a GPU's memory", "find out who"
        )


def _kind(found: Sequence[Mapping[str, Any]]) -> str:
    if not found:
        return "none"
    first = found[0]
    return f"{len(found)} x {first['name']} of {first['memory'] / GIB:.0f} GiB"


def machine(
    known: Mapping[str, Mapping[str, Any]], objects: Mapping[str, float], gpus: Mapping[str, int]
) -> Iterator[Finding]:
    cpus, memory = _range(known, "cpus", 1), _range(known, "memory", GIB)
    free = _range(known, "free_memory", GIB)
    yield Finding("good", "memory", f"{cpus} CPUs and {memory} GiB a node, {free} GiB of it free")
    yield from _shared_memory(known, objects, gpus)
    for name in sorted({name for told in known.values() for name in told["disks"]}):
        disks = {at: told["disks"][name] for at, told in known.items() if name in told["disks"]}
        at, least = min(disks.items(), key=lambda each: each[1]["free"])
        found = f"{name}, {least['folder']}: {_size(least['free'])} free of {_size(least['total'])} on {at}"
        found += ", the least of all nodes" * (len(disks) > 1)
        used = max(1 - disk["free"] / max(1, disk["total"]) for disk in disks.values())
        if used > FULL:
            yield Finding("failed", "disk", f"{found}; {used:.0%} used", "make room: Ray stops at 95 %")
        elif least["free"] < LITTLE:
            yield Finding("warning", "disk", found, f"a job may need more than {_size(LITTLE)}")
        else:
            yield Finding("good", "disk", found)


def _shared_memory(
    known: Mapping[str, Mapping[str, Any]], objects: Mapping[str, float], gpus: Mapping[str, int]
) -> Iterator[Finding]:
    at, least = min(((at, told["shared_memory"]) for at, told in known.items()), key=lambda each: each[1])
    found = f"/dev/shm has {_size(least)} on {at}"
    do = "give it 30 % of the memory: docker run --shm-size, or in Kubernetes an emptyDir with medium Memory"
    small = [name for name, told in known.items() if told["shared_memory"] < objects[name]]
    if tight := [name for name, told in known.items() if gpus[name] > 1 and told["shared_memory"] < SHARED]:
        yield Finding("failed", "shared memory", f"{found}; NCCL needs 1 GiB on {_listed(tight)}", do)
    elif small:
        told = (
            f"{found}; less than Ray's object store of {_size(max(objects[name] for name in small))}, which is on disk"
        )
        yield Finding("warning", "shared memory", f"{told} ({_listed(small)})", do)
    else:
        yield Finding("good", "shared memory", found)


def clock(skews: Mapping[str, float]) -> Iterator[Finding]:
    """By how much the job's clock is ahead of each node's."""
    if not skews:
        return
    at, worst = max(skews.items(), key=lambda each: abs(each[1]))
    found = f"{at} is {abs(worst):.1f} s {'behind' if worst > 0 else 'ahead'}"
    do = "have chrony or systemd-timesyncd run on every node"
    if abs(worst) > TOO_SKEWED:
        yield Finding("failed", "clock", f"{found}; S3 refuses such requests", do)
    elif abs(worst) > SKEW:
        yield Finding("warning", "clock", f"{found}; curves and logs will be out of order", do)
    else:
        yield Finding("good", "clock", f"all within {max(abs(worst), 0.1):.1f} s")


def place(key: str, uri: str, known: Mapping[str, bool]) -> Iterator[Finding]:
    """What a key of the configuration names."""
    if missing := [at for at, there in known.items() if not there]:
        do = READ if len(missing) == len(known) else "on several nodes a local path must be a folder that all share"
        yield Finding("failed", key, f"{uri}: nothing is there on {_listed(missing)}", do)
    else:
        yield Finding("good", key, f"{uri} is there" + (" on every node" if len(known) > 1 else ""))


def out(uri: str, known: Mapping[str, Mapping[str, float]]) -> Iterator[Finding]:
    write, read = (min(told[way] for told in known.values()) / 1e6 for way in ("write", "read"))
    yield Finding(
        "good", "out", f"{uri}: written at {write:,.0f} MB/s and read at {read:,.0f} MB/s by the slowest node"
    )


# -- what the job itself looks at --------------------------------------------------------------------------------------


def _store(config: Config) -> str:
    try:
        return shown(tracking.store_uri(config))
    except UserError:
        return "tracking.uri"


def _tracking(config: Config) -> None:
    cluster.refuse_local_store(tracking.store_uri(config))
    tracking.refuse_unreachable(config)


def _room(config: Config, gpu: bool) -> None:
    cluster.refuse_unplaceable(config.finetune.workers, gpu)
    for key in cluster.DOES:
        section, _, name = key.partition(".")
        cluster.workers(getattr(getattr(config, section), name), key)


def _study(config: Config) -> Iterator[Finding]:
    from pipelines import finetune, generate
    from pipelines.models import family_of

    if not _far(config):
        finetune.refuse_impossible(config, family_of(config), config.training_rows())
        generate.refuse_impossible_rows(config)
        yield Finding("good", "study", "its rows can be trained and sampled")


def _far(config: Config) -> list[str]:
    """Files of the family's that would be downloaded, gigabytes of them."""
    return [uri for uri in (config.family.weights, config.family.tokenizer) if uri and not storage.is_local(uri)]


def weights(config: Config) -> Iterator[Finding]:
    """By the readers of the jobs, which map a file into memory: names and shapes are read, and little more."""
    from cil.checkpoints import compare
    from pipelines.memory import network_of
    from pipelines.models import family_of, refusing_weights
    from pipelines.weights import is_ours, read_weights

    rows = {row.settings.weights for row in config.training_rows().values()}
    rows |= {row.weights for row in config.arms().values()}
    uris = sorted({row for row in rows if row and "/" in row})
    if far := [*_far(config), *(uri for uri in uris if not storage.is_local(uri))]:
        do = "name a local copy to have its layout looked at now"
        yield Finding("warning", "weights", f"{', '.join(far)}: every node downloads it at its first use", do)
        return
    if not config.family.weights and not uris:
        yield Finding("good", "weights", "none are named: networks begin with random ones")
        return
    family = family_of(config)
    for uri in filter(None, (config.family.weights, *uris)):
        if uri != config.family.weights and is_ours(uri):
            read_weights(config, uri)
        else:
            with refusing_weights("weights"):
                compare(network_of(family).state_dict(), family.restore(Path(uri)), family.name)
        yield Finding("good", "weights", f"{uri} is of {family.name}, {family.preset}")


def exchange(ranks: Sequence[str], nodes: int, gpu: bool, seconds: float) -> Iterator[Finding]:
    from pipelines.exchange import all_reduce

    way = "NCCL" if gpu else "gloo"
    if not ranks:
        raise UserError("finetune.gpu=true: the cluster has no GPU")
    what = ("GPU" if gpu else "rank") + "s" * (len(ranks) != 1)
    found = f"{len(ranks)} {what} on {nodes} {_nodes(nodes)} by {way}"
    bandwidth = all_reduce(ranks, gpu, seconds)
    if len(ranks) < 2:
        yield Finding("good", "all-reduce", f"{found}: nothing to exchange")
        return
    found += f": {bandwidth / 1e9:.2f} GB/s"
    if bandwidth < SLOW[gpu]:
        do = "look at NCCL_SOCKET_IFNAME and NCCL_IB_HCA, with NCCL_DEBUG=INFO" if gpu else "is that the fast network?"
        yield Finding("warning", "all-reduce", f"{found} is slow for exchanging gradients", do)
    else:
        yield Finding("good", "all-reduce", found)


# -- wording -----------------------------------------------------------------------------------------------------------


def _by(values: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    """The nodes that have each value, those of the most first."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name, value in values.items():
        groups[value].append(name)
    return sorted(groups.items(), key=lambda each: -len(each[1]))


def _listed(nodes: Sequence[str]) -> str:
    more = len(nodes) - SHOWN
    return ", ".join(sorted(nodes)[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _nodes(count: int) -> str:
    return "node" if count == 1 else "nodes"


def _size(number: float) -> str:
    return f"{number / GIB:,.0f} GiB" if number >= 10 * GIB else f"{number / GIB:,.1f} GiB"


def _range(known: Mapping[str, Mapping[str, Any]], name: str, unit: float) -> str:
    values = [told[name] / unit for told in known.values()]
    least, most = f"{min(values):,.0f}", f"{max(values):,.0f}"
    return least if least == most else f"{least} to {most}"
