"""The miniature's training data as files, in LLaVA's layout."""

from __future__ import annotations

import pytest

from voco_model.data.records import open_records
from voco_model.data.samples import sample_of
from voco_model.miniature.dataset import write_data

pytest.importorskip("sklearn", reason="the miniature's digits need scikit-learn")


def test_written_conversations_are_read_as_samples(tmp_path):
    path = write_data(tmp_path / "data", 3)
    records = open_records(str(path))
    assert len(records) == 3
    for number in range(3):
        sample = sample_of(records[number], records.where(number), path.parent)
        assert len(sample.messages) == 16 and sample.loose == 0
        assert [picture.size() for picture in sample.pictures] == [(48, 48)]
    with pytest.raises(ValueError, match="expected a new or empty folder, got .*data"):
        write_data(tmp_path / "data", 3)
    assert len(list(path.parent.iterdir())) == 4
