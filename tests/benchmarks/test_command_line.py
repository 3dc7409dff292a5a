"""Which sides a benchmark runs."""

from __future__ import annotations

import pytest

from benchmarks.__main__ import _parser, _tuned, main
from benchmarks.tasks import TASKS


@pytest.mark.parametrize(
    ("arguments", "sides"),
    [
        ([], ()),
        (["--tuned"], ("trl-tuned", "trl-flat")),
        (["--tuned", "trl-flat"], ("trl-flat",)),
        (["--baseline", "none", "--tuned"], ()),
    ],
)
def test_the_best_settings_are_none_all_or_those_named(arguments, sides):
    assert _tuned(_parser().parse_args(["sft", *arguments])) == sides


def test_an_unknown_side_is_refused_before_anything_runs():
    with pytest.raises(SystemExit, match="sft has trl-tuned, trl-flat, not 'trl-fast'"):
        main(["sft", "--tuned", "trl-fast"])


@pytest.mark.parametrize("task", TASKS)
def test_every_side_that_a_task_offers_is_defined(task):
    from benchmarks.tasks import task_named

    offer = TASKS[task]
    assert {*offer.ours, *offer.default("trl"), *offer.best("trl")} == set(task_named(task).sides)
