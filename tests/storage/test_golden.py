"""Every format version stays readable: golden parts decode to the values that were committed with them."""

from __future__ import annotations

import re

import numpy as np
import pytest

from eopd.storage.codec import FORMAT_VERSION
from eopd.storage.coverage import DrawsNeed, ExtraIdsNeed, HeadNeed
from eopd.storage.teacher_cache import TeacherCache
from eopd.storage.teacher_record import TeacherRows
from eopd.storage.verification import verify

from .make_golden import FOLDER, HEAD, VOCABULARY, artifact
from .making import dense, header, rows_of
from .test_codec import assert_same

VERSIONS = sorted(int(re.findall(r"\d+", path.name)[0]) for path in FOLDER.glob("version*.npz"))


def test_the_current_version_has_a_golden_part() -> None:
    assert list(range(1, FORMAT_VERSION + 1)) == VERSIONS


@pytest.mark.parametrize("version", VERSIONS)
def test_a_golden_part_decodes_to_its_values(version: int) -> None:
    cache = TeacherCache(artifact(version))
    rows = cache.read_part(0)
    with np.load(FOLDER / f"version{version}.npz", allow_pickle=False) as values:
        assert set(values.files) == set(TeacherRows.__dataclass_fields__)
        for name in values.files:
            if values[name].dtype == np.float32:  # exp and log may differ in their last bit between platforms
                np.testing.assert_allclose(getattr(rows, name), values[name], rtol=2e-6, atol=1e-7, err_msg=name)
            else:
                np.testing.assert_array_equal(getattr(rows, name), values[name], err_msg=name)
    cache.require([HeadNeed(8, 0.8), DrawsNeed("beyond_head", max_weight=0.03), ExtraIdsNeed(2)])
    assert cache.header(0) == header(HEAD, VOCABULARY, extra_k=2)
    assert verify(FOLDER / f"version{version}") == []


def test_version_1_holds_what_was_scored() -> None:
    rows = rows_of(dense(1, [12, 0, 30], VOCABULARY), HEAD, extra_k=2)
    assert_same(TeacherCache(artifact(1)).read_part(0), rows)
