"""The batch API against a real server on this machine: gathered, resumed, and never sent twice."""

import asyncio
import json
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from bimedix_jax.curation.llm.account import Account, Price, Stopped
from bimedix_jax.curation.llm.client import Client, Unanswered, open_client
from bimedix_jax.curation.llm.config import LlmConfig
from bimedix_jax.curation.llm.request import Reply, Request
from bimedix_jax.curation.llm.store import open_store


def respond(body: dict[str, Any]) -> str:
    return "echo " + body["messages"][-1]["content"]


def request(text: str) -> Request:
    return Request("test", text, 0, ({"role": "user", "content": text},), "prompt", max_tokens=50)


def talk(path: Path, server: Any, work: Callable[[Client], Awaitable[Any]], **options: Any) -> Any:
    async def run() -> Any:
        with open_store(path) as store:
            config = LlmConfig(model="m", base_url=server.url, api_key_env="", batch=True, poll_seconds=0.05, **options)
            async with open_client(config, Account(store, {"m": Price(1.0, 1.0, 1.0)})) as client:
                return await work(client)

    return asyncio.run(run())


async def ask_all(client: Client) -> list[Any]:
    waiting = (client.ask(request(str(number))) for number in range(12))
    return await asyncio.gather(*waiting, return_exceptions=True)


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr("bimedix_jax.curation.llm.batch.GATHER_SECONDS", 0.05)


def test_requests_are_collected_answered_and_priced_as_a_batch(serve, tmp_path):
    server = serve(respond=respond)
    path = tmp_path / "store.sqlite"
    replies = talk(path, server, ask_all)
    assert [reply.text for reply in replies] == [f"echo {number}" for number in range(12)]
    assert len(server.batches) == 1
    assert talk(path, server, ask_all) == [Reply(**{**vars(reply), "cached": True}) for reply in replies]
    assert len(server.batches) == 1
    with open_store(path) as store:
        (row,) = Account(store, {"m": Price(1.0, 1.0, 1.0)}).rows()
    assert row["batched"]
    assert row["usd"] == pytest.approx((row["prompt_tokens"] + row["completion_tokens"]) / 2e6)


def test_a_full_batch_is_sent_immediately(serve, tmp_path):
    server = serve(respond=respond)
    talk(tmp_path / "store.sqlite", server, ask_all, batch_size=5)
    sizes = [len(data.splitlines()) for name, data in server.files.items() if name.startswith("file-")]
    assert sorted(sizes) == [2, 5, 5]


def test_failed_lines_are_requested_again(serve, tmp_path):
    server = serve(respond=respond, fault=lambda body, nth: "500" if nth == 0 else None)
    replies = talk(tmp_path / "store.sqlite", server, ask_all)
    assert all(reply.ok for reply in replies)
    assert len(server.batches) == 2
    stats = server.stats()
    assert (stats["received"], stats["answered"], stats["twice"]) == (24, 12, 0)


def test_a_batch_of_a_run_that_ended_is_fetched_by_the_next_run(serve, tmp_path):
    server = serve(respond=respond, latency=30.0)
    path = tmp_path / "store.sqlite"

    async def leave(client: Client) -> None:
        task = asyncio.create_task(ask_all(client))
        while not identities(path):
            await asyncio.sleep(0.02)
        task.cancel()

    talk(path, server, leave)
    (name,) = server.batches
    server.run_batch(name)
    assert all(reply.ok for reply in talk(path, server, ask_all))
    assert server.stats()["received"] == 12
    assert len(server.batches) == 1


def identities(path: Path) -> list[str]:
    connection = sqlite3.connect(path)
    found = connection.execute("SELECT id FROM batches WHERE id IS NOT NULL").fetchall()
    connection.close()
    return [row[0] for row in found]


@pytest.mark.parametrize("created", [True, False])
def test_a_batch_is_found_after_a_kill_before_its_id_was_stored(serve, tmp_path, created):
    server = serve(respond=respond)
    path = tmp_path / "store.sqlite"
    talk(path, server, ask_all)
    connection = sqlite3.connect(path)  # as it was before the id was seen
    with connection:
        connection.execute("UPDATE batches SET id = NULL, done = 0")
        connection.execute("UPDATE attempts SET ending = NULL, text = NULL")
    connection.close()
    if not created:
        server.batches.clear()
    assert all(reply.ok for reply in talk(path, server, ask_all))
    assert server.stats()["received"] == (12 if created else 24)
    assert len(server.batches) == 1


def test_requests_of_an_expired_batch_are_unanswered(serve, tmp_path):
    server = serve(respond=respond)

    def expire(name: str) -> None:
        server.batches[name].update(status="expired")

    server.run_batch = expire
    ends = talk(tmp_path / "store.sqlite", server, ask_all, max_attempts=1)
    assert {type(end) for end in ends} <= {Unanswered, Stopped}
    assert any("the batch expired without a result" in str(end) for end in ends)


def test_results_never_contain_the_api_key(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_KEY", "sk-secret-0123456789")
    server = serve(respond=respond)

    def fail(name: str) -> None:
        server.files["errors"] = b"\n".join(
            json.dumps(
                {
                    "custom_id": json.loads(line)["custom_id"],
                    "response": {"status_code": 400, "body": {"error": {"message": "sk-secret-0123456789"}}},
                }
            ).encode()
            for line in server.files[server.batches[name]["input_file_id"]].splitlines()
        )
        server.batches[name].update(status="completed", error_file_id="errors")

    server.run_batch = fail

    async def ask(client: Client) -> Any:
        return await client.ask(request("x"))

    path = tmp_path / "store.sqlite"

    async def run() -> Reply:
        with open_store(path) as store:
            config = LlmConfig(model="m", base_url=server.url, api_key_env="TEST_KEY", batch=True, poll_seconds=0.05)
            async with open_client(config, Account(store)) as client:
                return await client.ask(request("x"))

    reply = asyncio.run(run())
    assert "[key]" in (reply.failure or "")
    assert b"sk-secret" not in path.read_bytes()
