"""A training on two nodes of a Ray cluster outlives them, and has the weights of one that a single machine makes.

Each node has one CPU, which a worker takes, and is in a network namespace of its own; the job runs in the first one's.
The second node is told to go and goes, the one that comes in its place is lost without a word, the next one is cut off
from the network for a while, and another one comes. Then the job's own process is killed, and the same command goes on.
"""

import contextlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from nodes import Machine, another_node, cluster_environment, first_node, held, of_small_videos, two_machines
from processes import BIN, ROOT, begun, below, end, finished, free_port, until
from tracking_server import Server, curve

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

EVERY = 800  # samples from one checkpoint to the next
LEFT = 10  # seconds that a node has when it is told to go
WAITS = "finetune: waits for 2 workers of 1 CPU each: the cluster has {}; add nodes, or set finetune.workers\n"
ROW = "{base: {weights: null, seeds: [0], where: {}, samples: 1600, lr: 2.0e-3}}"

# The job, which soon says that it waits.
IMPATIENT = """
import runpy
from pipelines import finetune

finetune.QUIET = 2
runpy.run_module("jobs.finetune", run_name="__main__")
"""

# Somebody else's, which has both CPUs.
BUSY = """
import sys
import ray

@ray.remote(num_cpus=1)
class Busy:
    def here(self):
        pass

ray.init(logging_level="ERROR", log_to_driver=False)
busy = [Busy.remote(), Busy.remote()]
print(ray.get([each.here.remote() for each in busy]), flush=True)
sys.stdin.read()
"""


class Disturbed(NamedTuple):
    out: Path
    killed: int  # the exit code of the job, whose own process was killed,
    code: int  # and of the same command after it
    noticed: list[int]  # the samples of the checkpoints that there were when a node was about to go
    waited: str  # what the job said while somebody else had the CPUs
    stood: str  # while its workers stood still in their places
    lacked: str  # when a node was lost
    cut: str  # and when one was cut off
    again: str  # what the same command said after the job was killed


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    training = ["finetune.workers=2", f"finetune.checkpoint_every={EVERY}", f"finetune.rows={ROW}"]
    return [*of_small_videos(tmp_path_factory.mktemp("videos"), 12), *training, "generate.rows={}", "compare.claims=[]"]


@pytest.fixture(scope="module")
def cache(arguments, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    with begun("build_cache", *arguments, f"out={out}", RAY_ADDRESS="local") as build:
        finished(build)
    return out / "cache"


@pytest.fixture(scope="module")
def undisturbed(arguments, cache) -> Iterator[Callable[[], Path]]:
    """What this machine trains alone, while the nodes start."""
    with begun("finetune", *arguments, f"out={cache.parent}", RAY_ADDRESS="local") as training:

        def made() -> Path:
            if training.poll() is None:
                finished(training)
            return cache.parent

        yield made


@contextlib.contextmanager
def impatient(machine: Machine, said: Path, *arguments: str, **environment: str) -> Iterator[subprocess.Popen]:
    with said.open("w") as file:
        command = [*machine.inside, sys.executable, "-c", IMPATIENT, *arguments]
        told = {"cwd": ROOT, "env": environment, "stdout": file, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, start_new_session=True, **told)
    try:
        yield process
    finally:
        end(process)


@contextlib.contextmanager
def busy(machine: Machine, environment: dict[str, str]) -> Iterator[None]:
    """Somebody else has the CPUs."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([*machine.inside, sys.executable, "-c", BUSY], env=environment, **pipes) as process:
        process.stdout.readline()
        yield
        process.communicate()


def tell_to_go(node: subprocess.Popen, machine: Machine, environment: dict[str, str]) -> None:
    """As whoever takes a preemptible machine away does."""
    (raylet,) = below(node, "--node_id=")
    (name,) = (word.partition("=")[2] for word in raylet.cmdline() if word.startswith("--node_id="))
    drain = ["drain-node", f"--address={environment['RAY_ADDRESS']}", f"--node-id={name}", "--reason-message=told"]
    drain += ["--reason=DRAIN_NODE_REASON_PREEMPTION", f"--deadline-remaining-seconds={LEFT}"]
    subprocess.run([*machine.inside, BIN / "ray", *drain], env=environment, check=True, capture_output=True)


def there(out: Path) -> list[int]:
    return [int(manifest.parent.name) for manifest in out.glob("training/*/*/manifest.json")]


@pytest.fixture(scope="module")
def disturbed(arguments, cache, undisturbed, tmp_path_factory) -> Disturbed:
    out, said = tmp_path_factory.mktemp("disturbed"), tmp_path_factory.mktemp("said") / "said.txt"
    (out / "cache").symlink_to(cache)
    with contextlib.ExitStack() as stack:
        machines = stack.enter_context(two_machines())
        server = Server(out, free_port(), machines[0].address, machines[0].inside)
        stack.callback(server.kill)
        server.start()
        environment = cluster_environment(tmp_path_factory.mktemp("home"), machines[0]) | {
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
            "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
        }
        stack.enter_context(first_node(machines[0], environment))
        second = stack.enter_context(another_node(machines[1], environment))

        def goes_on() -> None:
            before = len(said.read_text())
            until(lambda: "finetune base: " in said.read_text()[before:], 120)

        with busy(machines[0], environment):
            # Forgiven are a node which is lost without a word, and one which is cut off.
            forgiven = 1 + bool(machines[1].namespace)
            more = (f"out={out}", f"tracking.uri={server.uri}", f"finetune.max_failures={forgiven}")
            job = stack.enter_context(impatient(machines[0], said, *arguments, *more, **environment))
            until(lambda: "waits for" in said.read_text(), 120)
            waited = said.read_text()

        goes_on()
        with held(second, "RayTrainWorker"):
            tell_to_go(second, machines[0], environment)
        goes = time.time() + LEFT
        until(lambda: there(out), 120)
        noticed, before = there(out), len(said.read_text())
        with held(second, "RayTrainWorker"):
            until(lambda: time.time() > goes + 1)
            stood = said.read_text()[before:]
        until(lambda: not below(second, "RayTrainWorker"))
        end(second)

        third = stack.enter_context(another_node(machines[1], environment))
        goes_on()
        before = len(said.read_text())
        end(third)
        until(lambda: said.read_text()[before:].count("has 1 CPU") > 1)
        lacked = said.read_text()[before:]

        fourth = stack.enter_context(another_node(machines[1], environment))
        goes_on()
        before, cut = len(said.read_text()), ""
        if machines[1].namespace:
            machines[1].cut_off()  # what comes over the network stands still, and nobody is told
            until(lambda: "has 1 CPU" in said.read_text()[before:])
            machines[1].cut_off(False)
            until(lambda: fourth.poll() is not None)  # it hears that it was given up
            stack.enter_context(another_node(machines[1], environment))
            goes_on()
            cut = said.read_text()[before:]

        job.kill()
        killed = job.wait()
        again = said.with_name("again.txt")
        job = stack.enter_context(impatient(machines[0], again, *arguments, *more, **environment))
        return Disturbed(out, killed, job.wait(120), noticed, waited, stood, lacked, cut, again.read_text())


def weights(out: Path) -> dict[str, bytes]:
    return {kind: (out / "weights/base" / kind / "toy.safetensors").read_bytes() for kind in ("raw", "ema")}


def test_a_training_whose_nodes_go_and_come_has_the_weights_of_an_undisturbed_one(disturbed, undisturbed):
    assert disturbed.code == 0
    assert weights(disturbed.out) == weights(undisturbed())


def test_a_node_that_is_told_to_go_gives_a_checkpoint_and_its_end_is_no_failure(disturbed):
    (samples,) = disturbed.noticed
    assert samples % EVERY
    assert disturbed.code == 0


def test_a_training_without_a_place_says_what_it_waits_for_and_keeps_saying_it(disturbed):
    assert WAITS.format("2 CPUs, 0 of them free") in disturbed.waited
    assert disturbed.lacked.count(WAITS.format("1 CPU")) > 1


def test_a_training_whose_node_is_cut_off_gives_it_up(disturbed):
    if not disturbed.cut:
        pytest.skip("no network namespace may be made here: a node cannot be cut off")
    waits, _, after = disturbed.cut.partition(WAITS.format("1 CPU"))
    assert "goes on from the checkpoint at" not in waits
    assert "goes on from the checkpoint at" in after


def test_a_training_whose_own_process_is_killed_goes_on_by_the_same_command(disturbed):
    assert disturbed.killed == -signal.SIGKILL  # it was not done
    (samples,) = (int(each) for each in re.findall(r"goes on from the checkpoint at (\d+) samples", disturbed.again))
    assert samples >= max(disturbed.noticed)


def test_a_training_that_stands_still_in_its_place_does_not_say_that_it_waits(disturbed):
    assert "waits" not in disturbed.stood


def test_the_curve_has_each_point_once(disturbed, undisturbed, smallest):
    assert curve(smallest(disturbed.out)) == curve(smallest(undisturbed()))
