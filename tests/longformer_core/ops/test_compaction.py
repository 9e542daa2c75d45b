from longformer_core.ops.compaction import compacted


def test_the_last_ones_fill_the_gaps() -> None:
    assert compacted(5, {1}) == [0, 4, 2, 3]
    assert compacted(6, [0, 5, 2]) == [3, 1, 4]
    assert compacted(4, ()) == [0, 1, 2, 3]
    assert compacted(3, {0, 1, 2}) == []
