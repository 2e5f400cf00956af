"""Pictures that are the same but for their encoding: a perceptual hash, and which of many hashes are near each other.

labels = near_duplicates(np.array([picture_hash(frame) for frame in pictures], np.uint64))
kept = labels == np.arange(len(labels))
"""

import numpy as np
from torch import Tensor

SIDE = 32  # pixels that a picture is hashed at
FLAT = 2.0  # grey levels: the deviation of a picture below which its hash would be one of noise
SMALL = 256  # hashes compared each with each

# The cosines of odd horizontal frequency: what mirroring left and right turns the sign of.
MIRRORED = sum(1 << i for i in range(64) if i % 2)


def picture_hash(frame: Tensor) -> int:
    """Perceptual hash of a uint8 frame [H, W, 3]: the signs of its 63 lowest frequencies. 0: flat, which says nothing.

    Pictures that differ by a re-encoding, a resizing or a little brightness are within 3 bits of each other, different
    ones about 32. A mirrored picture is a different one: its hash is `picture_hash(frame) ^ MIRRORED`.
    """
    import cv2

    cv2.setNumThreads(1)
    grey = cv2.cvtColor(np.ascontiguousarray(frame.numpy()), cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    if small.std() < FLAT:
        return 0
    signs = cv2.dct(small)[:8, :8].ravel() > 0
    signs[0] = True  # the mean, always: so that no hash is 0
    return sum(1 << i for i, sign in enumerate(signs.tolist()) if sign)


def near_duplicates(hashes: np.ndarray, distance: int = 3) -> np.ndarray:
    """int64 [N]: for each of the hashes uint64 [N] the first one of its group, which may be itself.

    Groups are the connected components of hashes that differ in at most `distance` bits, exactly. A hash of 0 is alone.

    Cut into `distance` + 1 bands, two such hashes agree in one of them. So hashes are sorted by each band, and those
    that agree in it are compared each with each, or, where they are many, sorted again like that by their other bits.
    """
    if hashes.dtype != np.uint64 or hashes.ndim != 1:
        raise ValueError(f"hashes {hashes.dtype} {list(hashes.shape)}: expected uint64 [N]")
    if not 0 <= distance < 64:
        raise ValueError(f"distance={distance}: 0 to 63")
    unique, first, where = np.unique(hashes, return_index=True, return_inverse=True)
    forest = _Forest(len(unique))
    begin = int(len(unique) > 0 and unique[0] == 0)
    if distance and len(unique) > begin:
        _join(unique, np.arange(begin, len(unique)), forest, distance)
    roots = forest.roots(np.arange(len(unique)))
    earliest = np.full(len(unique), len(hashes))
    np.minimum.at(earliest, roots, first)
    labels = earliest[roots][where]
    return np.where(hashes == 0, np.arange(len(hashes)), labels)


def _join(hashes: np.ndarray, members: np.ndarray, forest: "_Forest", distance: int) -> None:
    x = hashes[members]
    varying = int(np.bitwise_or.reduce(x ^ x[0]))
    bits = [1 << i for i in range(64) if varying >> i & 1]
    if len(bits) <= distance:
        forest.join(members[1:], np.full(len(members) - 1, members[0]))
        return
    for band in range(distance + 1):
        keys = x & np.uint64(sum(bits[band :: distance + 1]))
        order = np.argsort(keys)
        starts = np.flatnonzero(np.diff(keys[order], prepend=~keys[order[:1]]))
        sizes = np.diff(starts, append=len(x))
        roots = forest.roots(members[order])
        unjoined = np.minimum.reduceat(roots, starts) < np.maximum.reduceat(roots, starts)  # not one component yet
        ranks = np.arange(len(x)) - np.repeat(starts, sizes)
        left = np.repeat(np.where(unjoined & (sizes <= SMALL), sizes, 0), sizes) - ranks  # in the group, from here on
        for apart in range(1, int(left.max(initial=0))):
            left_here = np.flatnonzero(left > apart)
            a, b = order[left_here], order[left_here + apart]
            near = np.bitwise_count(x[a] ^ x[b]) <= distance
            forest.join(members[a[near]], members[b[near]])
        for i in np.flatnonzero(unjoined & (sizes > SMALL)):
            group = members[order[starts[i] : starts[i] + sizes[i]]]
            roots = forest.roots(group)
            if (roots != roots[0]).any():
                _join(hashes, group, forest, distance)


class _Forest:
    """Disjoint sets of 0 .. n - 1, joined many at once. The root of a set is its least element."""

    def __init__(self, n: int) -> None:
        self._parent = np.arange(n)

    def roots(self, x: np.ndarray) -> np.ndarray:
        root: np.ndarray = self._parent[x]
        while (further := self._parent[root] != root).any():
            root[further] = self._parent[root[further]]
        self._parent[x] = root
        return root

    def join(self, a: np.ndarray, b: np.ndarray) -> None:
        while len(a):
            a, b = self.roots(a), self.roots(b)
            differ = a != b
            a, b = np.minimum(a, b)[differ], np.maximum(a, b)[differ]
            np.minimum.at(self._parent, b, a)
