"""Pictures in shards that are streamed over http from a server of this machine, whose connections break."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill.common.errors import UserError
from distill.data.cache import LatentCache
from distill.data.make_cache import make_cache
from distill.data.parts import open_parts
from distill.data.places import RemoteFiles
from distill.data.samples import Fitting
from distill.models.families import MINI_FAMILY
from tests.distill.data.server import Server
from tests.distill.pictures import png, save_tar


def save_shards(folder: Path, shards: int, samples: int) -> None:
    """`shard-0.tar` and so on; the first is twice as long as the others."""
    for number in range(shards):
        keys = [f"{number}{index}" for index in range(samples if number else 2 * samples)]
        files = [file for key in keys for file in ((f"{key}.png", png()), (f"{key}.txt", f"thing {key}".encode()))]
        save_tar(folder / f"shard-{number}.tar", files)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("distill.data.places.WAITS_S", (0.0, 0.0, 0.0))
    monkeypatch.setattr("distill.data.places.PIECE_BYTES", 3000)
    monkeypatch.setattr("distill.data.parts.PART_BYTES", 12_000)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    save_shards(tmp_path / "photos", 5, 4)
    server = Server(tmp_path / "photos")
    yield server
    server.stop()


def files_of(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cache.iterdir() if path.name != "cache.json"}


def test_streamed_shards_go_on_after_a_fault_and_give_the_same_cache_to_any_number_of_processes(
    server: Server, mini_vega: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shard in the middle is torn, and is left out as one bad sample."""
    torn = tmp_path / "photos" / "shard-2.tar"
    torn.write_bytes(torn.read_bytes()[:1024] + b"x" * 1024)
    copies, copied = tmp_path / "temporary", []
    copy = RemoteFiles.copy

    def counting(files: RemoteFiles, name: str, stamp: tuple[int, str], target: Path) -> None:
        copy(files, name, stamp, target)
        copied.append((name.partition("?")[0], len(list(copies.rglob("*.tar")))))

    monkeypatch.setattr(RemoteFiles, "copy", counting)
    server.faults = [500, 503]
    make_cache(mini_vega, f"{server.url}/shard-{{0..4}}.tar", tmp_path / "one")
    told = capsys.readouterr().out
    assert "trying again in" in told and "6 shards, 10.4 kB a sample" in told
    assert f"{server.url}/shard-2.tar is no whole, uncompressed tar file" in told and "skipped 1 of 21 samples" in told
    assert [name for name, _ in copied] == [f"shard-{n}.tar" for n in range(5)] and max(n for _, n in copied) <= 3
    assert len(LatentCache(tmp_path / "one", batch_size=2, seed=0)) == 20

    server.faults = [403] * 9
    with pytest.raises(UserError, match=rf"{server.url}/shard-.* cannot be had \(.*403"):
        make_cache(mini_vega, f"{server.url}/", tmp_path / "two", rank=1, processes=2)
    server.faults = []
    for rank in (1, 0):
        make_cache(mini_vega, f"{server.url}/*.tar", tmp_path / "two", rank=rank, processes=2)
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")
    copied.clear()
    (tmp_path / "two" / "shard-000001.safetensors").unlink()
    make_cache(mini_vega, f"{server.url.replace('//', '//me:secret@')}/shard-{{0..4}}.tar?key=secret", tmp_path / "two")
    assert "secret" not in (tmp_path / "two" / "cache.json").read_text() + capsys.readouterr().out
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one") and [name for name, _ in copied] == ["shard-0.tar"]
    assert not list(copies.rglob("*.tar"))


def test_a_shard_that_changes_is_one_line(server: Server, mini_vega: Path, tmp_path: Path) -> None:
    data = f"{server.url}/shard-{{0..1}}.tar"
    parts = open_parts(data, MINI_FAMILY, 0, Fitting(), 1)
    assert open_parts(f"{data}?signature=2", MINI_FAMILY, 0, Fitting(), 1).identity == parts.identity
    save_tar(tmp_path / "photos" / "shard-1.tar", [("a.png", png("blue")), ("a.txt", b"a")])
    with pytest.raises(UserError, match=f"{server.url}/shard-1.tar has changed since this command began"):
        list(parts.opened(range(parts.count)))
    assert open_parts(data, MINI_FAMILY, 0, Fitting(), 1).identity != parts.identity


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ("URL/shard-{0..9}.tar", "URL/shard-5.tar is not there"),
        ("URL/x-*.tar", "there are no such shards"),
        ("URL/shard-{0..9.tar", "its braces do not close"),
        ("URL/shard-0.tar.gz", "compressed shards cannot be read by index"),
        ("URL/torn.tar", r"URL/torn.tar has 1000 bytes and is no whole, uncompressed tar file"),
        ("http://{a,b}/shard.tar", "names its host or bucket whole"),
        ("http://127.0.0.1:9/shard.tar", r"cannot be had after 4 tries \(.*Connect"),
        ("nothing://x/y.tar", "cannot be read here: Protocol not known"),
        ("zip::http://x/y.tar", "names its host or bucket whole"),
    ],
)
def test_shards_that_cannot_be_had_are_one_line(data: str, told: str, server: Server, tmp_path: Path) -> None:
    (tmp_path / "photos" / "torn.tar").write_bytes(bytes(1000))
    with pytest.raises(UserError, match=told.replace("URL", server.url)) as refusal:
        open_parts(data.replace("URL", server.url), MINI_FAMILY, 0, Fitting(), 1)
    assert "\n" not in str(refusal.value)
