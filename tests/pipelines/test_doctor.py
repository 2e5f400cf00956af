"""What the doctor makes of what nodes say, and what a node says of itself."""

import json
import re
import sys
import threading
import time

import pytest
import ray
import torch
from processes import free_port

from cil import families
from pipelines import cluster, doctor, node
from pipelines.config import load
from pipelines.errors import UserError
from pipelines.exchange import Rank

GIB = 2**30


def states(findings) -> list[str]:
    return [finding.state for finding in findings]


# -- judging -----------------------------------------------------------------------------------------------------------


def test_versions_that_differ_fail_and_each_is_named_with_its_nodes():
    same = {"python": "3.11.2", "torch": "2.13.0"}
    without = dict.fromkeys("abcd", 0)
    others = {"b": same | {"torch": "2.12.0"}, "d": same | {"nccl": "2.27"}}
    found = list(doctor.versions({"a": same, "b": same, "c": same, "d": same} | others, without, False))
    assert states(found) == ["failed", "failed"]
    assert found[0].found == "nccl none on a, b, c, 2.27 on d"
    assert found[1].found == "torch 2.13.0 on a, c, d, 2.12.0 on b"
    assert states(doctor.versions({"a": same, "b": same}, without, False)) == ["good"]


def test_a_head_for_cpus_goes_with_workers_for_cuda_that_are_alike():
    head = {"torch": "2.13.0", "cuda": "none"}
    worker, gpus = {"torch": "2.13.0", "cuda": "13.0", "nccl": "2.27"}, {"head": 0, "a": 8, "b": 8}
    (good,) = doctor.versions({"head": head, "a": worker, "b": worker}, gpus, True)
    assert (good.state, good.found) == ("good", "torch 2.13.0, cuda 13.0, nccl 2.27")
    found = list(doctor.versions({"head": head, "a": worker, "b": head}, gpus, True))
    assert [each.found for each in found] == ["cuda 13.0 on a, none on b", "nccl 2.27 on a, none on b"]
    (found,) = doctor.versions({"head": head | {"torch": "2.12.0"}, "a": worker, "b": worker}, gpus, True)
    assert found.found == "torch 2.13.0 on a, b, 2.12.0 on head"


def test_a_pytorch_for_cpus_on_nodes_with_gpus_that_are_wanted_fails_and_elsewhere_is_good():
    told = {"torch": "2.13.0", "cuda": "none"}
    gpus = {"a": 8, "b": 8, "head": 0}
    (found,) = doctor.versions({"a": told, "b": told, "head": told}, gpus, True)
    assert (found.state, found.found) == ("failed", "a, b: PyTorch is a build for CPUs where Ray has GPUs")
    assert states(doctor.versions({"head": told}, gpus, True)) == ["good"]  # the others do not answer
    assert states(doctor.versions({"a": told, "b": told, "head": told}, gpus, False)) == ["good"]


def test_the_version_of_torch_is_told_without_what_it_was_built_for(monkeypatch):
    monkeypatch.setattr("pipelines.artifact._version", lambda name: "2.13.0+cu130" if name == "torch" else "1")
    assert node.versions()["torch"] == "2.13.0"


def test_a_compiler_is_wanted_only_where_no_operator_was_compiled_with_deepspeed(monkeypatch):
    node.deepspeed(gpu=False)
    monkeypatch.setattr("shutil.which", lambda tool: None)
    with pytest.raises(FileNotFoundError, match=r"g\+\+ and ninja missing"):
        node.deepspeed(gpu=False)
    monkeypatch.setitem(sys.modules["deepspeed.git_version_info"].installed_ops, "deepspeed_shm_comm", True)
    node.deepspeed(gpu=False)


def test_another_state_of_our_code_on_a_node_fails():
    assert states(doctor.code({"a": "12", "b": "12"})) == ["good"]
    (found,) = doctor.code({"a": "12", "b": "34", "c": "12"})
    assert (found.state, found.found) == ("failed", "ours differs: 12 on a, c, 34 on b")


@pytest.mark.parametrize(("skew", "state"), [(0.3, "good"), (-5.0, "warning"), (5.0, "warning"), (1000.0, "failed")])
def test_clocks_that_are_apart_are_told_by_the_worst(skew, state):
    (found,) = doctor.clock({"a": 0.01, "b": skew})
    assert found.state == state
    assert state == "good" or found.found.startswith(f"b is {abs(skew)} s {'behind' if skew > 0 else 'ahead'}")


def machine_of(shared: float = 64 * GIB, free: float = 500 * GIB, total: float = 1000 * GIB, gpus: int = 0):
    told = {"cpus": 8, "memory": 64 * GIB, "free_memory": 60 * GIB, "shared_memory": shared}
    disks = {"disks": {"out": {"folder": "/out", "free": free, "total": total}}}
    others = told | {"disks": {"out": {"folder": "/out", "free": 900 * GIB, "total": 1000 * GIB}}}
    found = doctor.machine(
        {"a": others | {"shared_memory": 64 * GIB}, "b": told | disks}, {"a": 2e10, "b": 2e10}, {"a": 0, "b": gpus}
    )
    return {finding.check: finding for finding in found}


def test_a_disk_that_is_nearly_full_on_one_node_fails_and_one_with_little_room_is_a_warning():
    assert machine_of()["disk"].state == "good"
    little = machine_of(free=10 * GIB, total=100 * GIB)["disk"]
    assert (little.state, "10 GiB free of 100 GiB on b" in little.found) == ("warning", True)
    assert machine_of(free=30 * GIB)["disk"].state == "failed"  # 97 % used: Ray makes no more objects


def test_shared_memory_is_to_hold_rays_objects_and_what_nccl_needs():
    assert machine_of()["shared memory"].state == "good"
    assert machine_of(shared=10 * GIB)["shared memory"].state == "warning"
    assert machine_of(shared=GIB // 16, gpus=8)["shared memory"].state == "failed"


def gpus_of(*counts: int, name: str = "H100", used: float = 0.0, in_ray: int = 8):
    known = {
        f"n{i}": [{"name": name, "memory": 80 * GIB, "used": used * GIB}] * count for i, count in enumerate(counts)
    }
    return list(doctor.gpu_line(known, dict.fromkeys(known, in_ray)))


def test_gpus_of_ray_are_those_of_the_driver_and_nobody_else_uses_them():
    (found,) = gpus_of(8, 8)
    assert (found.state, found.found) == ("good", "8 x H100 of 80 GiB on n0, n1")
    assert states(gpus_of(0, 0, in_ray=0)) == ["good"]
    assert gpus_of(8, 7)[0].found == "n1: Ray has more GPUs there than the driver"
    assert states(gpus_of(8, 7)) == ["failed"]
    assert states(gpus_of(8, 8, in_ray=4)) == ["warning"]
    assert states(gpus_of(8, 8, used=40)) == ["good", "warning"]


def test_what_nodes_could_not_answer_fails_once_for_all_that_say_the_same():
    facts = {
        "a": {"out": {"problem": "no way"}},
        "b": {"out": {"is": {"write": 1e6, "read": 2e6}}},
        "c": {"out": {"problem": "no way"}},
    }
    failed, good = doctor.judged("out", lambda known: doctor.out("/out", known), facts)
    assert (failed.state, failed.found) == ("failed", "a, c: no way")
    assert good.found == "/out: written at 1 MB/s and read at 2 MB/s by the slowest node"


def test_a_path_that_some_nodes_lack_is_to_be_shared_and_one_that_all_lack_to_be_mended():
    (some,) = doctor.place("family.weights", "/w", {"a": True, "b": False})
    (none,) = doctor.place("family.weights", "/w", {"a": False, "b": False})
    assert (some.state, none.state) == ("failed", "failed")
    assert "share" in some.do
    assert "credentials" in none.do


def test_more_nodes_than_fit_into_a_line_are_counted():
    (found,) = doctor.code({f"n{i}": "12" if i else "34" for i in range(9)})
    assert found.found == "ours differs: 12 on n1, n2, n3, n4 and 4 more, 34 on n0"


# -- a node ------------------------------------------------------------------------------------------------------------


def test_a_check_that_crashes_or_hangs_costs_its_own_answer_alone():
    begin = time.monotonic()
    found = node.in_time({"crash": lambda: 1 // 0, "hang": threading.Event().wait, "good": lambda: 7}, 0.3)
    assert found == {
        "crash": {"problem": "ZeroDivisionError: integer division or modulo by zero"},
        "hang": {"problem": "no answer in 0.3 s"},
        "good": {"is": 7},
    }
    assert time.monotonic() - begin < 2


def test_a_probe_is_written_read_and_removed(tmp_path):
    told = node.probe(str(tmp_path / "new"))
    assert min(told.values()) > 0
    assert not list((tmp_path / "new").iterdir())


def test_a_place_that_cannot_be_written_to_is_a_problem(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="a file cannot be written to: "):
        node.probe(str(tmp_path / "file" / "out"))


def test_a_probe_that_cannot_be_read_is_removed_too(tmp_path, monkeypatch):
    def refuse(uri: str) -> bytes:
        raise OSError("Input/output error")

    monkeypatch.setattr(node.storage, "read", refuse)
    with pytest.raises(OSError, match="a file cannot be read: Input/output error"):
        node.probe(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_bucket_is_probed_and_one_that_is_not_there_is_a_problem(endpoint):
    assert min(node.probe("s3://webvid/out").values()) > 0
    assert not node.seen("s3://webvid/out")
    with pytest.raises(OSError, match=r"a file cannot be written to: .*bucket"):
        node.probe("s3://no-such-bucket/out")


def test_every_path_of_a_configuration_is_looked_for(tmp_path):
    row = f"{{base: {{weights: {tmp_path}/started}}}}"
    named = {
        "family.weights": "/w",
        "catalog.csv": "[/a.csv,s3://b/c.csv]",
        "score.videos": "{ours: /ours}",
        "generate.images": "s3://b/images",
        "finetune.rows": row,
    }
    config = load(None, [f"{key}={value}" for key, value in named.items()] + ["out=/out", "compare.note=a/b"])
    assert doctor.places_of(config) == {
        "family.weights": "/w",
        "catalog.csv[0]": "/a.csv",
        "catalog.csv[1]": "s3://b/c.csv",
        "score.videos.ours": "/ours",
        "generate.images": "s3://b/images",
        "finetune.rows.base.weights": f"{tmp_path}/started",
    }


def test_code_is_the_files_of_all_three_floors(monkeypatch, tmp_path):
    file = tmp_path / "pipelines" / "node.py"
    file.parent.mkdir()
    file.write_text("1")
    monkeypatch.setattr(node, "__file__", str(file))
    before = node.code()
    for name in ("cil", "jobs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.py").write_text("1")
        assert node.code() != before
        before = node.code()


# -- weights -----------------------------------------------------------------------------------------------------------


def test_weights_are_looked_at_as_the_jobs_will_read_them(smallest, tmp_path):
    family = families.load("toy", preset="tiny")
    state = family.network(0).state_dict()
    family.export(state, tmp_path)
    file = tmp_path / "toy.safetensors"
    (found,) = doctor.weights(config := smallest(tmp_path, f"finetune.rows.base.weights={file}"))
    assert (found.state, found.found) == ("good", f"{file} is of toy, tiny")
    family.export({f"of_another.{name}": tensor for name, tensor in state.items()}, tmp_path)
    with pytest.raises(UserError, match="not the weights of toy"):
        list(doctor.weights(config))
    file.write_text("<!doctype html>")
    with pytest.raises(UserError, match="a web page, as a download leaves"):
        list(doctor.weights(config))


def test_weights_that_every_node_would_download_are_a_warning(smallest, tmp_path):
    (found,) = doctor.weights(smallest(tmp_path, "finetune.rows.base.weights=s3://nowhere/w.ckpt"))
    assert found.state == "warning"


# -- the whole ---------------------------------------------------------------------------------------------------------


def test_a_cluster_that_is_not_there_is_a_failed_line_at_once(smallest, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(UserError, match="1 of 1 checks failed: cluster"):
        doctor.doctor(smallest(tmp_path))
    assert capsys.readouterr().out.startswith("failed   cluster: 127.0.0.1:9 cannot be reached (")


@pytest.mark.slow
def test_a_laptop_is_well_and_what_is_wrong_is_told_as_lines_or_as_json(smallest, tmp_path, capsys):
    doctor.doctor(smallest(tmp_path / "out"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("doctor: nothing failed; ")
    assert not list(tmp_path.iterdir())  # it leaves nothing behind
    wrong = (f"finetune.rows.base.weights={tmp_path}/none.ckpt", "tracking.uri=http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"checks failed: finetune\.rows\.base\.weights, tracking, weights$"):
        doctor.doctor(smallest(tmp_path / "out", *wrong, "doctor.as_json=true"))
    found = {each["check"]: each for each in json.loads(capsys.readouterr().out) if each["state"] == "failed"}
    assert "nothing is there" in found["finetune.rows.base.weights"]["found"]
    assert "cannot be reached" in found["tracking"]["found"]
    with pytest.raises(UserError, match="checks failed: node, "):
        doctor.doctor(smallest(tmp_path / "out", "doctor.seconds=0.001"))
    assert re.search(r"^failed   node: \S+: no answer in 0.003 s; ", capsys.readouterr().out, re.M)


# -- the all-reduce ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_all_reduce_that_is_slow_warns_and_one_that_does_not_come_about_says_why(monkeypatch):
    cluster.connect()
    (here,) = (each["NodeID"] for each in ray.nodes())
    assert states(doctor.exchange([here], 1, False, 60)) == ["good"]
    monkeypatch.setitem(doctor.SLOW, False, float("inf"))
    (slow,) = doctor.exchange([here, here], 1, False, 60)
    assert slow.state == "warning"
    assert re.fullmatch(r"2 ranks on 1 node by gloo: [0-9.]+ GB/s is slow for exchanging gradients", slow.found)
    with pytest.raises(TimeoutError, match=r"^2 of 2 ranks did not start in 0 s: a node that starts no process"):
        list(doctor.exchange([here, here], 1, False, 0))
    with pytest.raises(UserError, match=r"^finetune\.gpu=true: the cluster has no GPU"):
        list(doctor.exchange([], 1, True, 1))


def test_a_rank_says_that_its_pytorch_sees_no_gpu_or_that_its_sum_is_wrong(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"^PyTorch sees no GPU where Ray has one"):
        Rank().reduce("", 0, 1, "nccl", 10)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sent: sent.mul_(2))
    with pytest.raises(RuntimeError, match=r"^rank 0 was given a wrong sum"):
        Rank().reduce(f"127.0.0.1:{free_port()}", 0, 1, "gloo", 10)
