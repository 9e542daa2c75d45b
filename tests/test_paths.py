import pytest

from tests.helpers import without_kernels
from tests.paths import way_to_attention

# With the compiled kernels two more files are entered: `ops/cpu/decode.py` and what it shares.
MOST_FILES = 14
MOST_CALLS = 14


def test_the_way_to_attention_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    without_kernels(monkeypatch)
    way = way_to_attention()
    assert way.calls[0].endswith("PretrainedModel.__call__")
    assert way.calls[-1].endswith("blocked_attention")
    assert len(way.files) <= MOST_FILES, way.files
    assert len(way.calls) <= MOST_CALLS, way.calls
