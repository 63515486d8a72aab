"""Reading images, and replacing those that cannot be read."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import numpy as np
from grain.experimental import index_shuffle

from dino_jax.data.decode import BadImage, decode
from dino_jax.data.sources import Source
from dino_jax.errors import UserError

PROBES = 100  # images tried before a data set is called unreadable
SMALL = 1 << 16  # up to here permutations are stored: grain's index_shuffle can take 42 ms an index

Bad = tuple[int, str, str]  # index, name, reason


@dataclasses.dataclass
class Reader:
    """Reads images, and replaces unreadable ones by others, chosen by (seed, index) alone."""

    source: Source
    channels: int
    limit: int | None  # longest side, pixels
    seed: int
    max_bad_share: float
    where: str  # the name of the data set in errors
    bad: dict[int, tuple[str, str]] = dataclasses.field(
        default_factory=dict
    )  # index -> name, reason; those that this process met

    def probe(self) -> None:
        """Raises `UserError` if none of up to `PROBES` images chosen at random can be read."""
        count, key = len(self.source), mixed_word(self.seed, 2)
        tried = sorted(shuffled(place, count, key) for place in range(min(count, PROBES)))
        for index in tried:
            try:
                self.read(index)
                return
            except BadImage as error:
                reason = f"{error.name}: {error}"
        raise UserError(
            f"{self.where}: none of the {len(tried)} images tried can be read; the last is {reason}; "
            "fix them or name another data set"
        )

    def read(self, index: int) -> tuple[np.ndarray, int]:
        """Pixels uint8 [H, W, C] and label. Raises `BadImage`, with the image's name."""
        name = f"image {index}"
        try:
            image, label, name = self.source[index]
            return decode(image, self.channels, self.limit), label
        except BadImage as error:
            error.name = error.name or name
            raise

    def read_or_replace(self, index: int) -> tuple[np.ndarray, int, int, list[Bad]]:
        """Pixels, label, the index that was read, and the unreadable images before it."""
        met: list[Bad] = []
        for candidate in itertools.chain([index], self._others(index)):
            if candidate not in self.bad:
                try:
                    return *self.read(candidate), candidate, met
                except BadImage as error:
                    self.note(candidate, error.name, str(error))
            met.append((candidate, *self.bad[candidate]))
        raise UserError(f"{self.where}: no image can be read; {self._first()}")

    def note(self, index: int, name: str, reason: str) -> None:
        """Remembers an unreadable image; too many are a `UserError`."""
        self.bad[index] = (name, reason)
        count, total = len(self.bad), len(self.source)
        if count > self.max_bad_share * total:
            raise UserError(
                f"{self.where}: at least {count} of {total} images cannot be read, more than data.max_bad_share = "
                f"{self.max_bad_share:g}; {self._first()}; fix or remove them, or raise data.max_bad_share"
            )

    def _others(self, index: int) -> Iterator[int]:
        """All examples, in an order that depends on the index."""
        key, count = mixed_word(self.seed, index, 1), len(self.source)
        return (shuffled(place, count, key) for place in range(count))

    def _first(self) -> str:
        return "first " + ", ".join(f"{name} ({reason})" for name, reason in itertools.islice(self.bad.values(), 3))


def shuffled(place: int, count: int, key: int) -> int:
    """Element `place` of the permutation of 0..count-1 that a 32-bit key selects, in constant time and memory."""
    if count <= SMALL:
        return int(_permutation(count, key)[place])
    return index_shuffle(place, max_index=count - 1, seed=key, rounds=4)


@functools.lru_cache(maxsize=8)
def _permutation(count: int, key: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key)).permutation(count)


def mixed_word(*numbers: int) -> int:
    """A 32-bit hash of whole numbers."""
    return int(np.random.SeedSequence([number % 2**64 for number in numbers]).generate_state(1)[0])
