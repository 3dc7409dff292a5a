"""Labels of rows to classes: their kinds, their order, and what is refused."""

from __future__ import annotations

import pytest

from ftlib.data.labels import Labels, find_labels
from ftlib.errors import ConfigError, DataError


def found(cells):
    labels, problems = find_labels(cells)
    assert not problems
    return labels


@pytest.mark.parametrize(
    ("cells", "names", "several"),
    [
        (["spam", "ham", "spam"], ("ham", "spam"), False),
        ([10, 9, 10, 2], ("2", "9", "10"), False),
        ([1.0, 0.0], ("0", "1"), False),
        ([True, False], ("False", "True"), False),
        (["10", "9"], ("10", "9"), False),
        ([["b", "a"], [], ["c"]], ("a", "b", "c"), True),
        ([[], ["x"]], ("x",), True),
        ([[0, 1, 1], [1, 0, 0]], ("0", "1", "2"), True),
    ],
)
def test_classes_are_found_sorted_numbers_by_size(cells, names, several):
    assert found(cells) == Labels(names, several)
    assert found(cells[::-1]) == Labels(names, several)


def test_a_name_and_its_place_are_the_same_class():
    labels = Labels(("ham", "spam"))
    assert labels.numbers("spam") == labels.numbers(1) == labels.numbers(1.0) == {"label": 1.0}


def test_numbers_that_are_names_are_no_places():
    """Of stars 1 to 5, 1 is the first class, and 0 is none."""
    labels = found([1, 2, 3, 4, 5])
    assert labels.numbers(1) == labels.numbers("1") == {"label": 0.0}
    with pytest.raises(DataError, match=r"expected one of the classes .*, got 0"):
        labels.numbers(0)


def test_true_and_false_are_places_where_the_names_say_something_else():
    assert Labels(("wrong", "right")).numbers(True) == {"label": 1.0}
    assert found([True, False]).numbers(True) == {"label": 1.0}


def test_a_set_of_classes_is_one_number_each_by_name_or_place():
    labels = Labels(("a", "b", "c"), several=True)
    assert labels.columns == ("label_0", "label_1", "label_2")
    assert labels.numbers(["c", "a"]) == labels.numbers([1, 0, 1])
    assert list(labels.numbers(["c", "a"]).values()) == [1.0, 0.0, 1.0]
    assert list(labels.numbers([]).values()) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("labels", "cell", "code", "words"),
    [
        (Labels(("a", "b")), "c", "unknown_label", "one of the classes"),
        (Labels(("a", "b")), 2, "unknown_label", "one of the classes"),
        (Labels(("a", "b")), -1, "unknown_label", "one of the classes"),
        (Labels(("a", "b")), ["a"], "bad_label", "expected one class"),
        (Labels(("a", "b")), None, "missing_label", "expected a class"),
        (Labels(("a", "b")), "", "missing_label", "expected a class"),
        (Labels(("a", "b")), 0.5, "bad_label", "expected a class"),
        (Labels(("a", "b"), several=True), "a", "bad_label", "a list of class names"),
        (Labels(("a", "b"), several=True), ["z"], "unknown_label", "one of the classes"),
        (Labels(("a", "b"), several=True), [1, 0, 1], "bad_label", r"per class \(2\)"),
        (Labels(("a", "b"), several=True), [2, 0], "bad_label", "expected a class"),
    ],
)
def test_what_is_no_label_is_refused_with_its_kind(labels, cell, code, words):
    with pytest.raises(DataError, match=words) as caught:
        labels.numbers(cell)
    assert (caught.value.code, caught.value.column) == (code, "label")


def test_rows_of_another_kind_are_all_named():
    labels, problems = find_labels(["a", 1, "b", ["a"], None])
    assert labels is None
    assert sorted(row for row, _ in problems) == [1, 3, 4]
    labels, [(row, error)] = find_labels([[1, 0], [0, 1], [1, 0, 1]])
    assert (labels, row) == (None, 2)
    assert "per class (2)" in str(error)


@pytest.mark.parametrize("names", [("a",), (), ("a", ""), ("a", "b", "a")])
def test_classes_that_are_too_few_nameless_or_named_twice_are_refused(names):
    with pytest.raises(ConfigError, match="expected"):
        Labels(names)


def test_one_class_alone_is_no_classification():
    with pytest.raises(ConfigError, match=r"at least 2 classes with names, got \['a'\]"):
        find_labels(["a", "a"])
