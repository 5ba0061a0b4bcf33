"""Failure domains for machines of one host: told by the user, kept when a machine is replaced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence


def next_domain(domains: Sequence[str], live: Collection[str]) -> str:
    """Returns the domain of the next machine: the first of ``domains``, repeated, that no live machine stands for.

    So machine i gets ``domains[i % len(domains)]``, and a replacement that of the machine that it replaces.
    """
    if not domains:
        return ""
    covered, index = Counter(live), 0
    while covered[domain := domains[index % len(domains)]] > 0:
        covered[domain] -= 1
        index += 1
    return domain
