"""The simulation behind docs/scale.md, in cases that can be worked out, and the page that it writes."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import scale
from benchmarks.scale import GPUS, OWN, Build, bottleneck, made, rate, simulate, stations, step
from cil.nets.autoencoder import Autoencoder
from cil.nets.lvdm import LVDMUNet

SMALL = 300_000  # clips: the same as of ten million, for a test


def test_the_tables_of_the_page_are_those_that_the_command_writes():
    page = scale.PAGE.read_text()
    others = scale.TABLES.keys() - {"large"}  # made as `webvid` is, in seconds
    assert scale.filled(page, others) == page, "run python -m benchmarks.scale"


@pytest.mark.parametrize(("workers", "rounds"), [(1, 12), (5, 3), (12, 1), (100, 1)])
def test_parts_of_one_size_take_as_many_rounds_as_workers_need_for_them(workers, rounds):
    told = made([30] * 12, [0.0] * workers, own=3.0, shared=math.inf, handing=0, writing=0.5)
    assert told.seconds == pytest.approx(rounds * (30 / 3 + 30 * 0.5))
    assert told.first == pytest.approx(25)


def test_workers_who_share_a_store_make_together_what_it_gives():
    told = made([30] * 40, [0.0] * 8, own=3.0, shared=12.0, handing=0, writing=0)
    assert told.seconds == pytest.approx(30 * 40 / 12)


def test_a_driver_that_hands_out_slowly_is_waited_for():
    told = made([30] * 40, [0.0] * 1000, own=3.0, shared=math.inf, handing=2.0, writing=0)
    assert told.seconds == pytest.approx(39 * 2 + 10)


def test_a_worker_that_starts_late_takes_what_is_left():
    told = made([30] * 3, [0.0, 12.0], own=3.0, shared=math.inf, handing=0, writing=0)
    assert (told.seconds, told.clips) == (pytest.approx(22), 90)


@pytest.mark.parametrize("prefixes", [1, 16])
def test_more_gpus_are_never_slower_and_every_clip_is_made_once(prefixes):
    told = [simulate(Build(SMALL + 7, gpus, prefixes)) for gpus in GPUS]
    assert [each.clips for each in told] == [SMALL + 7] * len(GPUS)
    assert [each.making for each in told] == sorted((each.making for each in told), reverse=True)
    assert all(0 < each.busy <= 1 for each in told)


@pytest.mark.parametrize("gpus", GPUS)
def test_the_limit_that_is_named_is_the_slowest_station_and_the_build_comes_near_it(gpus):
    build = Build(10_000_000, gpus, videos_per_part=3000)
    able = stations(build)
    assert able[bottleneck(build)] == min(able.values())
    starting, writing = 62, 3000 * rate("bytes of a clip") / rate("a connection to S3")
    best = build.clips / min(able.values())
    one = 3000 / min(able[name] / gpus for name in OWN)
    rounds = math.ceil(build.parts / gpus)
    assert best <= simulate(build).making <= best + starting + rounds * writing + one + writing


def test_from_the_numbers_of_gpus_in_the_table_on_a_store_is_the_limit():
    build = Build(SMALL, 8)
    for name, gpus in scale.reached(build).items():
        able = {at: stations(replace(build, gpus=8 * round(gpus / 8 * at))) for at in (0.5, 1.5)}
        assert able[0.5]["GPUs"] < able[0.5][name] == able[1.5][name] < able[1.5]["GPUs"]


def test_a_step_is_never_slower_on_more_gpus_and_reads_what_it_trains_on():
    pace = [scale.batch_of(gpus) / step(gpus).seconds for gpus in GPUS]
    assert pace == sorted(pace)
    one = step(8)
    assert one.seconds == one.computing + one.reducing > one.reading


@pytest.mark.slow
def test_the_arithmetic_that_the_page_counts_with_is_what_pytorch_counts():
    with torch.device("meta"):
        vae, unet = Autoencoder().build(), LVDMUNet(tokens_per_frame=16)
        context = torch.empty(1, 77 + 16 * 16, 1024)
        calls = {
            "encoding": lambda: vae.encode(torch.empty(16, 3, 320, 512)),
            "a forward pass": lambda: unet(torch.empty(1, 16, 8, 40, 64), torch.tensor([500]), context),
        }
        for name, call in calls.items():
            with FlopCounterMode(display=False) as counted:
                call()
            assert counted.get_total_flops() == pytest.approx(rate(name), rel=1e-9)
