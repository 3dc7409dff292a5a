"""What was encoded once is encoded today. `golden` tells how the file is read, and writes it."""

from __future__ import annotations

import json

import pytest

from tests.data import golden

FROZEN = json.loads(golden.FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", golden.KINDS)
@pytest.mark.parametrize("template", golden.TEMPLATES)
def test_encodings_are_those_that_were_frozen(template, kind):
    assert golden.encodings(template, kind) == FROZEN[template][kind]


def test_every_conversation_is_frozen_under_every_template_and_tokenizer():
    grid = [(template, kind) for template in golden.TEMPLATES for kind in golden.KINDS]
    assert [(template, kind) for template, kinds in FROZEN.items() for kind in kinds] == grid
    assert len(grid) == 6 * 8
    for template, kind in grid:
        assert (
            list(FROZEN[template][kind])
            == list(golden.ROWS)
            == ["single", "multi", "tool", "system", "empty"]
        )
