import pytest

from vlm3d_ext.data.rank_share import rank_and_world_size, share_of_rank


def test_alone_everything_is_ones_own(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert rank_and_world_size() == (0, 1) and share_of_rank("abc") == ["a", "b", "c"]


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_each_part_is_in_one_share(monkeypatch, world_size):
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    shares = []
    for rank in range(world_size):
        monkeypatch.setenv("RANK", str(rank))
        shares.append(share_of_rank(range(4)))
    assert sorted(part for share in shares for part in share) == [0, 1, 2, 3]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
