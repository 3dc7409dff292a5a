from __future__ import annotations

from functools import partial

from ftlib.data.fingerprint import identity


def test_sets_in_code_have_one_identity_whatever_order_the_hash_seed_gives_them():
    """0 and 8 collide in a set of eight places, so the first one put in comes first."""
    one, other = frozenset([0, 8]), frozenset([8, 0])
    assert list(one) != list(other)
    assert identity(one) == identity(other)
    assert identity(partial(filter, one)) == identity(partial(filter, other))
    assert identity(one) != identity(frozenset([0, 9]))
    assert identity(one) != identity({0, 8})


def test_what_a_function_closes_over_is_part_of_it():
    def accepts(words):
        return lambda row: row["text"] in words

    assert identity(accepts(frozenset("ab"))) == identity(accepts(frozenset("ba")))
    assert identity(accepts(frozenset("ab"))) != identity(accepts(frozenset("ac")))
