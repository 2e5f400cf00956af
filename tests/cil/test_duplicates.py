"""Hashes of pictures, and which of many are near each other."""

from itertools import combinations

import cv2
import numpy as np
import pytest
import torch
from test_clip_scores import texture

from cil.metrics.duplicates import MIRRORED, near_duplicates, picture_hash
from pipelines.video import decode_all, encode

# -- the hash ----------------------------------------------------------------------------------------------------------

PICTURES = 12


def bits(a: int, b: int) -> int:
    return (a ^ b).bit_count()


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    """uint8 [N, H, W, 3], in colour."""
    made = [np.stack([texture(100 + 3 * n + c, 160, 256, 1.2) for c in range(3)], -1) for n in range(PICTURES)]
    return torch.from_numpy(np.stack(made).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def hashes(pictures) -> list[int]:
    return [picture_hash(picture) for picture in pictures]


def scaled(size: tuple[int, int]):
    return lambda picture: torch.from_numpy(cv2.resize(picture.numpy(), size, interpolation=cv2.INTER_AREA))


CHANGES = {
    "half the size": scaled((128, 80)),
    "another aspect": scaled((224, 224)),
    "twice the size": lambda picture: torch.from_numpy(cv2.resize(picture.numpy(), (512, 320))),
    "brighter": lambda picture: (picture.int() + 12).clip(0, 255).byte(),
    "more contrast": lambda picture: (picture * 1.1).clip(0, 255).byte(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_picture_is_within_three_bits(change, pictures, hashes):
    assert max(bits(picture_hash(CHANGES[change](p)), h) for p, h in zip(pictures, hashes, strict=True)) <= 3


@pytest.mark.parametrize("crf", [23, 35])
def test_a_picture_encoded_again_is_within_three_bits(crf, pictures, hashes):
    again = torch.cat([decode_all(encode(picture[None].repeat(3, 1, 1, 1), 8, crf))[1:2] for picture in pictures])
    assert not torch.equal(again, pictures)
    assert max(bits(picture_hash(p), h) for p, h in zip(again, hashes, strict=True)) <= 3


def test_different_pictures_are_far_apart(hashes):
    assert min(bits(a, b) for a, b in combinations(hashes, 2)) > 12


def test_a_mirrored_picture_has_another_hash_which_is_known(pictures, hashes):
    for picture, found in zip(pictures, hashes, strict=True):
        mirrored = picture_hash(picture.flip(1))
        assert bits(mirrored, found) > 24
        assert bits(mirrored, found ^ MIRRORED) <= 1


@pytest.mark.parametrize("level", [0, 7, 255])
def test_a_flat_picture_has_no_hash_and_any_other_has_one(level):
    flat = torch.full((64, 96, 3), level, dtype=torch.uint8)
    assert picture_hash(flat) == 0
    grain = torch.randint(0, 9, flat.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert picture_hash(grain + min(level, 240)) == 0
    flat[:, :48] = 128
    assert picture_hash(flat) > 0
    assert picture_hash(flat) & 1  # the bit that says so


# -- near duplicates ---------------------------------------------------------------------------------------------------


def brute_force(hashes: np.ndarray, distance: int) -> np.ndarray:
    """The least index that can be reached from each, in steps of at most `distance` bits."""
    near = np.bitwise_count(hashes[:, None] ^ hashes) <= distance
    near &= (hashes != 0) & (hashes != 0)[:, None]
    near |= np.eye(len(hashes), dtype=bool)
    labels = np.arange(len(hashes))
    while len(hashes):
        least = np.where(near, labels, len(hashes)).min(1)
        if (least == labels).all():
            break
        labels = least
    return labels


def words(random: np.random.Generator, n: int, width: int = 64) -> np.ndarray:
    return random.integers(0, 2**width, n, dtype=np.uint64)


def flipped(random: np.random.Generator, hashes: np.ndarray, count: int) -> np.ndarray:
    """`count` different bits of each turned over."""
    places = random.permuted(np.tile(np.arange(64, dtype=np.uint64), (len(hashes), 1)), axis=1)[:, :count]
    return hashes ^ np.bitwise_or.reduce(np.uint64(1) << places, axis=1)


def even_code(width: int) -> np.ndarray:
    """Extended Hamming code: 4 bits apart at the least, and many at just that."""
    x = np.arange(1 << width, dtype=np.uint64)
    parity = np.bitwise_count(x) & 1
    place = np.zeros_like(x)
    for i in range(width):
        place ^= np.where(x >> np.uint64(i) & np.uint64(1), i, 0).astype(np.uint64)
    return x[(parity == 0) & (place == 0)]


SETS = {
    "random": lambda r: words(r, 1000),
    "in pairs, 3 bits apart": lambda r: np.concatenate([x := words(r, 500), flipped(r, x, 3)]),
    "in pairs, 4 bits apart": lambda r: np.concatenate([x := words(r, 500), flipped(r, x, 4)]),
    "in chains": lambda r: np.bitwise_xor.accumulate(
        np.concatenate([words(r, 1), flipped(r, np.zeros(999, np.uint64), 3)])
    ),
    "dense": lambda r: words(r, 1500, 16),
    "all numbers": lambda r: np.arange(1024, dtype=np.uint64) << np.uint64(20),
    "one band the same": lambda r: words(r, 1500, 48) << np.uint64(16),
    "few ones": lambda r: np.bitwise_or.reduce(np.uint64(1) << r.integers(0, 64, (3, 1500), dtype=np.uint64), axis=0),
    "a code": lambda r: even_code(16) << np.uint64(7),
    "equal, and black": lambda r: r.choice(np.append(words(r, 50), np.zeros(20, np.uint64)), 1000),
    "black alone": lambda r: np.zeros(100, np.uint64),
    "none": lambda r: np.zeros(0, np.uint64),
}


@pytest.mark.parametrize("distance", [0, 1, 3, 6])
@pytest.mark.parametrize("name", SETS)
def test_near_duplicates_are_those_of_brute_force(name, distance, monkeypatch):
    hashes = SETS[name](np.random.default_rng(0))
    want = brute_force(hashes, distance)
    assert near_duplicates(hashes, distance).tolist() == want.tolist()
    monkeypatch.setattr("cil.metrics.duplicates.SMALL", 8)  # every group that can be is sorted again
    assert near_duplicates(hashes, distance).tolist() == want.tolist()


def test_hashes_of_three_bits_apart_are_joined_wherever_the_bits_are():
    base = 0x0123456789ABCDEF
    for places in list(combinations(range(64), 3))[::41]:
        pair = np.array([base, base ^ sum(1 << place for place in places)], np.uint64)
        assert near_duplicates(pair).tolist() == [0, 0], places


def test_of_fifty_thousand_those_that_were_planted_are_found():
    random = np.random.default_rng(0)
    originals = words(random, 40_000)
    hashes = np.concatenate([originals, flipped(random, originals[:10_000], 3)])
    where = random.permutation(len(hashes))
    labels = near_duplicates(hashes[where])
    assert labels.dtype == np.int64
    place = np.argsort(where)  # of each hash, after shuffling
    assert (labels[place[:10_000]] == labels[place[40_000:]]).all()
    assert len(np.unique(labels)) == 40_000  # and no others: 4e4^2 / 2 pairs, 2e-15 each


def test_a_thousandfold_black_frame_does_not_join_anything():
    hashes = np.array([0] * 50_000 + [1, 2, 3], np.uint64)
    assert near_duplicates(hashes).tolist() == [*range(50_000), 50_000, 50_000, 50_000]


def test_hashes_of_another_type_are_refused():
    with pytest.raises(ValueError, match="expected uint64"):
        near_duplicates(np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="distance=64"):
        near_duplicates(np.zeros(3, np.uint64), 64)
