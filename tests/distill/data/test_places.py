"""A cache that is read over http from a server of this machine, whose connections break."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch

from distill.common.errors import UserError
from distill.data.cache import LatentCache
from distill.data.make_cache import make_cache
from distill.data.places import open_place
from tests.distill.data.server import Server


@pytest.fixture
def server(mini_vega: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("distill.data.make_cache.SAMPLES_PER_SHARD", 9)
    monkeypatch.setattr("distill.data.places.WAITS_S", (0.0, 0.0, 0.0))
    make_cache(mini_vega, "shapes:45", tmp_path / "cache")
    server = Server(tmp_path / "cache")
    yield server
    server.stop()


def test_a_cache_on_a_server_gives_the_batches_of_the_folder(server: Server, capsys) -> None:
    here = LatentCache(server.folder, batch_size=4, seed=0)
    there = LatentCache(server.url, batch_size=4, seed=0)
    assert there.digest == here.digest and len(there) == 45
    for step in range(3):
        server.faults = [[], [503, 503], [0, 500]][step]
        ours, theirs = there.batch(step, slice(1, 4)), here.batch(step, slice(1, 4))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert capsys.readouterr().out.count("trying again in") >= 2
    assert all(asked.startswith("bytes=") for _, asked in server.sent), "the samples' own bytes, no whole shard"
    fsspec.filesystem("memory").put(str(server.folder), "/cache", recursive=True)
    in_memory = LatentCache(
        "memory://cache", batch_size=4, seed=0
    )  # which fetches one thing at a time, as the hub's does
    assert all(torch.equal(part, theirs[name]) for name, part in in_memory.batch(2, slice(1, 4)).items())


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda server: server.faults.extend([503] * 99), r"cannot be had after 4 tries \(.*503"),
        (lambda server: server.faults.append(403), r"cannot be had \(.*403.*see that this machine may read it"),
        (lambda server: [path.unlink() for path in server.folder.glob("shard*")], "is not there"),
        (lambda server: [p.write_bytes(bytes(p.stat().st_size)) for p in server.folder.glob("shard*")], "another than"),
    ],
)
def test_a_shard_that_stays_away_or_has_changed_is_one_line(server: Server, harm, told: str) -> None:
    there = LatentCache(server.url, batch_size=1, seed=0)
    harm(server)
    with pytest.raises(UserError, match=told) as refusal:
        there.batch(0)
    assert server.url in str(refusal.value) and "shard-" in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_file_that_is_damaged_is_told_of_its_place(server: Server) -> None:
    """A page of a login, say, in the place of each."""
    for name in ("cache.json", "index.safetensors", "unconditional.safetensors"):
        path = server.folder / name
        whole = path.read_bytes()
        for content in (b"<html>", b"", b'{"shards": "9"}'):
            path.write_bytes(content)
            for place in (server.folder, server.url):
                with pytest.raises(UserError, match=f"^{place}/{name}") as refusal:
                    LatentCache(place, batch_size=1, seed=0)
                assert "\n" not in str(refusal.value)
        path.write_bytes(whole)


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("nothing://x/y", "nothing://x/y cannot be read here: Protocol not known"),
        ("http://127.0.0.1:9/cache", r"http://127.0.0.1:9/cache/cache.json cannot be had after 4 tries"),
    ],
)
def test_a_place_that_is_none_is_one_line(place: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.data.places.WAITS_S", (0.0, 0.0, 0.0))
    with pytest.raises(UserError, match=told):
        LatentCache(place, batch_size=1, seed=0)
    assert open_place("folder").sizes() == {}
