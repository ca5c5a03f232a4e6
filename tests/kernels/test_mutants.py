"""The seeded faults of `make mutants` can be planted; whether tests find them takes hours, and is not asked here."""

import json

import pytest
from mutants import HERE, ROOT


@pytest.mark.parametrize("file", sorted((HERE / "mutants").glob("*.json")), ids=lambda file: file.stem)
def test_each_changes_a_text_that_stands_once(file):
    for mutant in json.loads(file.read_text()):
        text = (ROOT / "kernels/uae_kernels" / mutant["file"]).read_text()
        assert text.count(mutant["old"]) == 1 and mutant["new"] != mutant["old"], mutant["name"]
        assert (ROOT / mutant["test"].split()[0].partition("::")[0]).is_file(), mutant["name"]
