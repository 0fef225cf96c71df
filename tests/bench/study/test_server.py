"""Votes by HTTP: on the disk before they are confirmed, each once, whatever comes twice or breaks in between."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from aiohttp.test_utils import TestClient, TestServer

from bench.study.files import Key, key_path, read_key
from bench.study.server import make_app
from bench.study.votes import Vote, read_votes
from distill.common.errors import UserError
from tests.bench.study.simulated import saved, vote_as


def pictures(key: Key) -> dict[str, int]:
    return {name: item for name, (item, _) in key.pictures().items()}


def test_two_raters_at_once_double_votes_and_a_crash(study: Path, tmp_path: Path) -> None:
    key, path = read_key(key_path(study)), tmp_path / "votes.jsonl"
    one, other = vote_as(key, 1, [0, 1]), vote_as(key, 2, [0, 1])
    json_type = {"Content-Type": "application/json"}
    path.write_bytes(one[0].as_line() + one[1].as_line()[:25])  # the second was cut off by a crash

    async def talk() -> None:
        async with TestClient(TestServer(make_app(study, path))) as client:

            async def post(body: str, **about: object) -> tuple[int, str]:
                reply = await client.post("/votes", data=body, **({"headers": json_type} | about))
                return reply.status, await reply.text()

            parts = [saved(votes[:end]) for end in range(1, len(one) + 1) for votes in (one, other)]
            replies = await asyncio.gather(*map(post, parts + parts))
            assert {status for status, _ in replies} == {200}
            for bad in (saved(one)[:-9], saved(one).replace(key.study, "6" * 12), ""):
                status, told = await post(bad)
                assert status == 400 and "\n" not in told
            assert (await post(saved(one), headers={"Content-Type": "text/plain"}))[0] == 415
            assert (await client.get("/")).content_type == "text/html"
            assert (await client.get(f"/pictures/{one[0].first}.png")).status == 200
            assert (await client.get("/study.json")).status == 404
            with pytest.raises(UserError, match="another server"):
                make_app(study, path)

    asyncio.run(talk())
    assert sorted(path.read_bytes().splitlines(keepends=True)) == sorted(map(Vote.as_line, one + other))
    assert read_votes([path], key.study, pictures(key)) == one + other


@pytest.mark.parametrize("text", ['{"mine": 1}\nno end', '{"mine": 1}', '{"study": 3', "x"])
def test_a_file_of_something_else_is_left_as_it_was(text: str, study: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text(text)
    with pytest.raises(UserError, match="line 1: no vote"):
        make_app(study, tmp_path / "mine.jsonl")
    assert (tmp_path / "mine.jsonl").read_text() == text
    with pytest.raises(UserError, match="is no study"):
        make_app(tmp_path, tmp_path / "new.jsonl")
