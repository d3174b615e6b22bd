"""Runs that must agree but for the order of additions."""

from collections.abc import Callable

SEEDS = (1, 3, 4)


def for_one_of_the_seeds(check: Callable[[int], None]) -> None:
    """check(seed) must hold for one of three seeds.

    Rounding may move an activation across the kink of a leaky ReLU, and the two runs part there (by chance, in one run
    of some ten). A mistake parts them for every seed.
    """
    for seed in SEEDS[:-1]:
        try:
            check(seed)
        except AssertionError:
            continue
        return
    check(SEEDS[-1])
