"""The tree in errors.py's docstring is the tree of the code."""

import re

from millicent import errors


def all_kinds(kind: type[errors.MillicentError]) -> list[type[errors.MillicentError]]:
    return [kind, *(deeper for child in kind.__subclasses__() for deeper in all_kinds(child))]


def test_the_docstring_draws_the_tree_with_its_exit_codes() -> None:
    assert errors.__doc__
    drawn = dict(re.findall(r"(\w+Error) +(\d+)", errors.__doc__))
    kinds = [kind for kind in all_kinds(errors.MillicentError) if kind.__module__ == "millicent.errors"]
    assert {kind.__name__: str(kind.exit_code) for kind in kinds} == drawn
    indents = {name: len(before) for before, name in re.findall(r"^([ |`-]*)(\w+Error) ", errors.__doc__, re.MULTILINE)}
    for kind in kinds[1:]:
        assert indents[kind.__name__] == indents[kind.__base__.__name__] + 4, kind


def test_exit_codes_are_distinct_and_leave_the_shells_alone() -> None:
    codes = [kind.exit_code for kind in all_kinds(errors.MillicentError) if kind.__module__ == "millicent.errors"]
    assert len(set(codes)) == len(codes)
    assert not {0, 2, 126, 127, 128, 130} & set(codes)


def test_an_error_shows_what_was_found_and_what_to_do() -> None:
    error = errors.SizeError("The size is 0x0.", "Give more.")
    assert str(error) == "The size is 0x0. Give more."
