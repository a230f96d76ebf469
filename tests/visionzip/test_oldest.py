"""What the library says on a version of transformers that is older than a family needs."""

import pytest
import transformers

from tests.families.case import cases
from visionzip import attach


@pytest.mark.parametrize("case", [case for case in cases() if case.name in ("Idefics3", "SmolVLM")], ids=str)
def test_a_family_that_needs_a_newer_transformers_says_so(case, monkeypatch):
    monkeypatch.setattr(transformers, "__version__", "5.19.0")
    with pytest.raises(ValueError, match=r"transformers 5\.20 or newer, this is 5\.19\.0: pip install -U transformers"):
        attach(case.model(), case.processor(), case.budget)
