"""A client against a real server on this machine that misbehaves: nothing is lost, nothing is paid for twice."""

import asyncio
import json
import re
import socket
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict

from bimedix_jax.curation.llm.account import Account, BudgetReached, Price, Stopped, parse_prices
from bimedix_jax.curation.llm.batch import BatchTransport
from bimedix_jax.curation.llm.client import Client, Unanswered, open_client
from bimedix_jax.curation.llm.config import JudgeConfig, LlmConfig
from bimedix_jax.curation.llm.direct import DirectTransport, new_openai, retry_after
from bimedix_jax.curation.llm.pace import Pace
from bimedix_jax.curation.llm.request import Reply, Request, likely_tokens
from bimedix_jax.curation.llm.store import open_store
from bimedix_jax.errors import BimedixError


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")

    answer: int


class Clock:
    """Time that passes only where somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


def respond(body: dict[str, Any]) -> str:
    return json.dumps({"answer": len(body["messages"][-1]["content"])})


def request(text: str = "how long is this?", number: int = 0, **options: Any) -> Request:
    values: dict[str, Any] = {"schema": Answer, "max_tokens": 50, **options}
    return Request("test", "item", number, ({"role": "user", "content": text},), "prompt", **values)


def config(server: Any, **options: Any) -> LlmConfig:
    return LlmConfig(**{"model": "m", "base_url": server.url, "api_key_env": "", "timeout": 20.0, **options})


def talk(
    path: Path,
    server: Any,
    work: Callable[[Client], Awaitable[Any]],
    clock: Clock | None = None,
    account: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """`work(client)` with a store at `path`; with `clock` nothing waits."""

    async def run() -> Any:
        with open_store(path) as store:
            chosen = config(server, **options)
            owner = Account(store, **(account or {}))
            transport = DirectTransport(chosen, owner)
            made = clock or Clock()
            try:
                return await work(Client(chosen, owner, transport, made, made.sleep))
            finally:
                await transport.close()

    return asyncio.run(run())


def rows(path: Path, columns: str = "ending") -> list[Any]:
    connection = sqlite3.connect(path)
    found = connection.execute(f"SELECT {columns} FROM attempts ORDER BY started, number").fetchall()
    connection.close()
    return [row[0] if len(row) == 1 else row for row in found]


def test_a_reply_is_stored_with_its_usage_and_never_requested_again(serve, tmp_path):
    server = serve(respond=respond)
    path = tmp_path / "store.sqlite"

    async def ask(client: Client) -> Reply:
        return await client.ask(request("abc"))

    first, second = talk(path, server, ask), talk(path, server, ask)
    assert first.parsed == second.parsed == Answer(answer=3)
    assert (first.cached, second.cached) == (False, True)
    assert first.usage.completion > 0
    assert first.usage == second.usage
    assert server.stats()["received"] == 1
    assert rows(path, "ending, status, prompt_tokens, completion_tokens") == [
        ("reply", 200, first.usage.prompt, first.usage.completion)
    ]


def test_the_key_depends_on_model_payload_prompt_and_round(serve):
    server = serve()
    one = config(server)
    keys = {
        request().key(one),
        request("other text").key(one),
        request(number=1).key(one),
        request(temperature=0.5).key(one),
        request().key(config(server, model="other")),
        Request("test", "item", 0, request().messages, "other prompt", 50, schema=Answer).key(one),
    }
    assert len(keys) == 6
    # where the endpoint is, and whom a request is for, does not matter
    assert request().key(one) == request().key(config(serve())) == request(accept=lambda reply: None).key(one)


def test_equal_concurrent_requests_are_sent_once(serve, tmp_path):
    server = serve(respond=respond, latency=0.05)

    async def ask(client: Client) -> list[Reply]:
        return await asyncio.gather(*(client.ask(request()) for _ in range(20)))

    replies = talk(tmp_path / "store.sqlite", server, ask)
    assert [reply.parsed for reply in replies] == [Answer(answer=17)] * 20
    assert server.stats()["received"] == 1


@pytest.mark.parametrize(
    ("fault", "ending"),
    [
        ("429:1", "rate_limited"),
        ("500", "server_error"),
        ("cut", "cut"),
        ("truncated_body", "bad_body"),
        ("truncated_json", "reply"),
        ("content_filter", "reply"),
        ("ignored_schema", "reply"),
        ("hang", "timeout"),
    ],
)
def test_faults_are_retried_and_each_attempt_is_recorded(serve, tmp_path, fault, ending):
    server = serve(respond=respond, fault=lambda body, nth: fault if nth == 0 else None)
    path = tmp_path / "store.sqlite"
    clock = Clock()
    reply = talk(path, server, lambda client: client.ask(request()), clock, timeout=0.3 if fault == "hang" else 20.0)
    assert reply.parsed == Answer(answer=17)
    assert rows(path) == [ending, "reply"]
    assert server.stats()["received"] == 2
    assert (max(clock.slept, default=0) >= 1) == (fault == "429:1")


def test_a_truncated_reply_is_not_requested_again_unchanged(serve, tmp_path):
    server = serve(respond=respond, fault=lambda body, nth: "length")
    path = tmp_path / "store.sqlite"
    for _ in range(2):
        reply = talk(path, server, lambda client: client.ask(request()))
        assert not reply.ok
        assert reply.failure == "length"
        assert reply.parsed is None
    assert server.stats()["received"] == 1


@pytest.mark.parametrize("fault", ["ignored_schema", "content_filter", "truncated_json"])
def test_repetitions_after_unusable_replies_are_limited_and_stored(serve, tmp_path, fault):
    server = serve(respond=respond, fault=lambda body, nth: fault)
    path = tmp_path / "store.sqlite"
    expected = "content_filter" if fault == "content_filter" else "the reply holds no JSON object"
    for _ in range(2):
        reply = talk(path, server, lambda client: client.ask(request()), reasks=2)
        assert reply.failure == expected
    assert server.stats()["received"] == 3


def test_retry_after_of_200_seconds_pauses_all_requests(serve, tmp_path, capsys):
    first = [{"role": "user", "content": "a"}]
    server = serve(
        respond=respond, fault=lambda body, nth: "429:200" if (nth, body["messages"]) == (0, first) else None
    )
    clock = Clock()

    async def ask(client: Client) -> None:
        first = asyncio.create_task(client.ask(request("a")))
        while not clock.slept:
            await asyncio.sleep(0.01)
        await client.ask(request("b"))
        await first

    talk(tmp_path / "store.sqlite", server, ask, clock)
    assert clock.now >= 200
    assert "asks to wait 200 s" in capsys.readouterr().err
    assert server.stats()["received"] == 3


def test_a_retry_after_above_max_wait_ends_the_run_and_keeps_replies(serve, tmp_path):
    server = serve(respond=respond, fault=lambda body, nth: "429:200")
    with pytest.raises(Stopped, match=r"wait 200 s, longer than max-wait \(60 s\)"):
        talk(tmp_path / "store.sqlite", server, lambda client: client.ask(request()), max_wait=60.0)
    assert server.stats()["received"] == 1


def test_the_wait_is_at_least_retry_after(serve, tmp_path):
    """With the real clock."""
    server = serve(respond=respond, fault=lambda body, nth: "429:1" if nth == 0 else None)

    async def ask() -> float:
        with open_store(tmp_path / "store.sqlite") as store:
            async with open_client(config(server), Account(store)) as client:
                start = asyncio.get_running_loop().time()
                await client.ask(request())
                return asyncio.get_running_loop().time() - start

    assert asyncio.run(ask()) >= 1.0


def test_a_request_that_never_succeeds_is_retried_by_the_next_run(serve, tmp_path):
    server = serve(respond=respond, fault=lambda body, nth: "500" if nth < 3 else None)
    path = tmp_path / "store.sqlite"
    with pytest.raises(Unanswered, match="no reply in 3 attempts, the last one: server_error 500"):
        talk(path, server, lambda client: client.ask(request()), max_attempts=3)
    assert talk(path, server, lambda client: client.ask(request()), max_attempts=3).ok
    assert server.stats()["received"] == 4


def test_an_endpoint_that_is_down_stops_the_run_soon(serve, tmp_path):
    server = serve(fault=lambda body, nth: "500")

    async def ask(client: Client) -> list[Any]:
        waiting = (client.ask(request(str(number))) for number in range(200))
        return await asyncio.gather(*waiting, return_exceptions=True)

    ends = talk(tmp_path / "store.sqlite", server, ask, max_attempts=2, concurrency=4)
    assert {type(end) for end in ends} == {Unanswered, Stopped}
    assert server.stats()["received"] <= 20


def test_a_wrong_api_key_stops_the_run_and_is_never_printed(serve, tmp_path, monkeypatch, capsys):
    secret = "sk-secret-0123456789"
    monkeypatch.setenv("TEST_KEY", secret)
    server = serve(respond=respond)
    path = tmp_path / "store.sqlite"
    server.fault = lambda body, nth: f"401:{secret}"  # the server repeats the key in its message
    with pytest.raises(Stopped, match=r"\[key\].*correct this") as error:
        talk(path, server, lambda client: client.ask(request()), api_key_env="TEST_KEY")
    assert server.stats()["received"] == 1
    assert server.keys == [f"Bearer {secret}"]
    assert secret not in str(error.value)
    server.fault = lambda body, nth: None  # put right: the same request is asked again
    assert talk(path, server, lambda client: client.ask(request()), api_key_env="TEST_KEY").ok
    stored = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert secret.encode() not in stored
    assert secret not in "".join(capsys.readouterr())


def test_a_missing_api_key_is_an_error_before_anything_is_sent(serve, tmp_path, monkeypatch):
    monkeypatch.delenv("TEST_KEY", raising=False)
    server = serve()
    with pytest.raises(BimedixError, match="TEST_KEY holds no key"):
        talk(tmp_path / "store.sqlite", server, lambda client: client.ask(request()), api_key_env="TEST_KEY")
    assert server.stats()["received"] == 0


def test_options_that_the_endpoint_rejects_stop_the_run_and_can_be_corrected(serve, tmp_path):
    server = serve(respond=respond, fault=lambda body, nth: "400")
    path = tmp_path / "store.sqlite"

    async def ask(client: Client) -> list[Any]:
        waiting = (client.ask(request(str(number))) for number in range(9))
        return await asyncio.gather(*waiting, return_exceptions=True)

    ends = talk(path, server, ask, concurrency=1)
    assert any(isinstance(end, Stopped) and "correct the options" in str(end) for end in ends)
    assert server.stats()["received"] == 3
    server.fault = lambda body, nth: None
    assert all(reply.ok for reply in talk(path, server, ask))


def test_a_rejected_text_fails_alone(serve, tmp_path):
    server = serve(respond=respond, fault=lambda body, nth: "400" if "bad" in body["messages"][0]["content"] else None)

    async def ask(client: Client) -> list[Reply]:
        return [await client.ask(request(text)) for text in ("good", "bad", "bad too", "bad also", "fine")]

    replies = talk(tmp_path / "store.sqlite", server, ask)
    assert [reply.ok for reply in replies] == [True, False, False, False, True]
    assert "the endpoint refused the request (400)" in replies[1].failure


def test_concurrency_is_limited(serve, tmp_path):
    server = serve(respond=respond, latency=0.02)

    async def ask(client: Client) -> None:
        await asyncio.gather(*(client.ask(request(str(number))) for number in range(40)))

    talk(tmp_path / "store.sqlite", server, ask, concurrency=3)
    assert 1 < server.stats()["most_open"] <= 3


def test_limits_per_minute_hold():
    async def take(per_minute: int, amount: float, times: int) -> float:
        clock = Clock()
        pace = Pace(per_minute, clock, clock.sleep)
        await asyncio.gather(*(pace.take(amount) for _ in range(times)))
        return clock.now

    assert asyncio.run(take(600, 1, 100)) == pytest.approx(9.0)  # 10 a second, of which the first 10 at once
    assert asyncio.run(take(60_000, 5_000, 4)) == pytest.approx(15.0)  # 1,000 a second; the last leaves its debt
    assert asyncio.run(take(30, 1, 3)) == pytest.approx(4.0)


def test_limits_per_minute_include_retries(serve, tmp_path):
    server = serve(respond=respond, fault=lambda body, nth: "500" if nth == 0 else None)
    clock = Clock()

    async def ask(client: Client) -> None:
        await asyncio.gather(*(client.ask(request(str(number))) for number in range(15)))

    talk(tmp_path / "store.sqlite", server, ask, clock, requests_per_minute=60)
    assert server.stats()["received"] == 30
    assert clock.now >= 29


def test_the_budget_is_never_exceeded_and_stops_cleanly(serve, tmp_path):
    server = serve(respond=respond, latency=0.01)
    path = tmp_path / "store.sqlite"
    texts = [f"{number:04}" * 200 for number in range(100)]

    async def ask(client: Client) -> list[Any]:
        return await asyncio.gather(*(client.ask(request(text)) for text in texts), return_exceptions=True)

    ends = talk(path, server, ask, account={"budget_tokens": 15_000})
    done = [end for end in ends if isinstance(end, Reply)]
    assert {type(end) for end in ends} == {Reply, BudgetReached}
    spent = sum(prompt + completion for prompt, completion in rows(path, "prompt_tokens, completion_tokens"))
    assert 12_000 < spent <= 15_000
    assert len(done) == server.stats()["answered"] == len(rows(path))  # all that came back is committed
    assert set(rows(path)) == {"reply"}

    again = talk(path, server, ask, account={"budget_tokens": 15_000})  # earlier runs count
    assert sum(isinstance(end, Reply) for end in again) == len(done)
    assert server.stats()["received"] == len(done)
    more = talk(path, server, ask, account={"budget_tokens": 100_000})
    assert all(isinstance(end, Reply) for end in more)
    assert server.stats()["received"] == 100


def test_a_budget_in_dollars_needs_prices_and_holds(serve, tmp_path):
    server = serve(respond=respond)
    prices = parse_prices(["m=1000/500/2000"])  # dollars per million tokens: a dollar is soon spent
    path = tmp_path / "store.sqlite"

    async def ask(client: Client) -> list[Any]:
        client.account.check_model("m")
        waiting = (client.ask(request(str(number))) for number in range(1000, 1100))
        return await asyncio.gather(*waiting, return_exceptions=True)

    ends = talk(path, server, ask, account={"prices": prices, "budget_usd": 0.9})
    assert {type(end) for end in ends} == {Reply, BudgetReached}
    with open_store(path) as store:
        (row,) = Account(store, prices).rows()
    assert 0.1 < row["usd"] <= 0.9
    with pytest.raises(BimedixError, match="needs the price of m; give --prices"):
        talk(path, server, ask, account={"budget_usd": 0.9})


def test_attempts_of_unknown_cost_count_at_their_maximum(serve, tmp_path):
    server = serve(respond=respond, fault=lambda body, nth: "cut")
    path = tmp_path / "store.sqlite"
    with pytest.raises(Unanswered):
        talk(path, server, lambda client: client.ask(request()), max_attempts=2)
    with open_store(path) as store:
        account = Account(store)
        assert account.tokens == 2 * request().most_tokens(config(server)).total
        (row,) = account.rows()
    assert (row["failed_attempts"], row["unknown_cost_attempts"], row["usd"]) == (2, 2, None)


def test_the_ledger_has_stages_models_failures_and_cached_tokens(serve, tmp_path, capsys):
    from rich.console import Console

    server = serve(respond=respond, fault=lambda body, nth: "500" if nth == 0 else None)
    path = tmp_path / "store.sqlite"
    for model in ("m", "n"):
        talk(path, server, lambda client: client.ask(request("x" * 400)), model=model)
    with open_store(path) as store:
        account = Account(store, {"m": Price(10.0, 5.0, 20.0)})
        first, second = account.rows()
        account.print(Console(width=120))
    assert (first["stage"], first["model"], first["requests"], first["attempts"], first["failed_attempts"]) == (
        *("test", "m", 1, 2, 1),
    )
    assert (first["prompt_tokens"], first["cached_tokens"]) == (100, 50)
    expected = (50 * 10.0 + 50 * 5.0 + first["completion_tokens"] * 20.0) / 1e6
    assert first["usd"] == pytest.approx(expected)
    assert second["usd"] is None
    assert "the price of n is unknown" in capsys.readouterr().out


def test_open_attempts_of_a_killed_run_are_lost(serve, tmp_path):
    server = serve(respond=respond)
    path = tmp_path / "store.sqlite"

    async def cancel(client: Client) -> None:
        server.latency = 5.0
        task = asyncio.create_task(client.ask(request()))
        while not server.keys:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    talk(path, server, cancel)
    server.latency = 0.0
    assert rows(path) == [None]
    assert talk(path, server, lambda client: client.ask(request())).ok
    assert sorted(rows(path)) == ["lost", "reply"]


def test_two_processes_cannot_share_a_store(tmp_path):
    with (
        open_store(tmp_path / "store.sqlite"),
        pytest.raises(BimedixError, match="another process uses"),
        open_store(tmp_path / "store.sqlite"),
    ):
        pass


def test_files_that_are_no_stores_are_errors(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("these are notes" * 100)
    with pytest.raises(BimedixError, match="is not a store of replies"), open_store(path):
        pass
    assert path.read_text() == "these are notes" * 100
    connection = sqlite3.connect(tmp_path / "other.sqlite")
    connection.execute("CREATE TABLE notes (text TEXT)")
    connection.close()
    with pytest.raises(BimedixError, match="another program's database"), open_store(tmp_path / "other.sqlite"):
        pass


def test_all_spellings_of_retry_after_are_read():
    assert retry_after({"retry-after": "2.5"}) == 2.5
    assert retry_after({"retry-after-ms": "1500", "retry-after": "9"}) == 1.5
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0.0
    assert retry_after({"retry-after": "soon"}) is None
    assert retry_after({}) is None


def test_invalid_prices_and_options_are_errors(tmp_path):
    assert parse_prices(["a=b=1/2/3"])["a=b"] == Price(1.0, 2.0, 3.0)
    (tmp_path / "prices.json").write_text('{"m": {"prompt": 1, "cached": 0.5, "completion": 4, "batch": 0.5}}')
    assert parse_prices([str(tmp_path / "prices.json")]) == {"m": Price(1.0, 0.5, 4.0, 0.5)}
    with pytest.raises(BimedixError, match="--prices m is given twice; give it once"):
        parse_prices(["m=1/2/3", "n=1/2/3", "m=4/5/6"])
    for wrong in ("m=1/2", "m", str(tmp_path / "none.json")):
        with pytest.raises(BimedixError, match="price"):
            parse_prices([wrong])
    wrong_options: list[dict[str, Any]] = [
        *({"concurrency": 0}, {"extra": "[]"}, {"extra": "{"}, {"requests_per_minute": 0}, {"reasks": -1}),
    ]
    for options in wrong_options:
        with pytest.raises(ValueError):
            LlmConfig(model="m", **options)


def test_the_judge_inherits_the_writers_options():
    base = LlmConfig(model="m", base_url="http://a/v1", requests_per_minute=7)
    assert JudgeConfig().over(base) == base
    other = JudgeConfig(model="n", base_url="http://b/v1").over(base)
    assert (other.model, other.base_url, other.requests_per_minute) == ("n", "http://b/v1", 7)


def test_likely_tokens_of_english_and_arabic():
    assert likely_tokens("a" * 400) == 100
    assert likely_tokens("س" * 400) == 200
    assert likely_tokens("") == 0


class Nowhere:
    """A URL at which nothing listens."""

    def __init__(self) -> None:
        with socket.socket() as reserved:
            reserved.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{reserved.getsockname()[1]}/v1"


@pytest.mark.parametrize("batch", [False, True])
def test_an_endpoint_that_does_not_listen_is_one_sentence_and_costs_nothing(tmp_path, batch):
    clock, path, place = Clock(), tmp_path / "store.sqlite", Nowhere()
    spent = []

    async def run() -> None:
        with open_store(path) as store:
            chosen = config(place, batch=batch)
            owner = Account(store, budget_tokens=10**6)
            transport = (BatchTransport if batch else DirectTransport)(chosen, owner)
            client = Client(chosen, owner, transport, clock, clock.sleep)
            try:
                await client.ask(request())
            finally:
                spent.append((owner.tokens, owner.rows()[0]["unknown_cost_attempts"]))
                await transport.close()

    with pytest.raises(Stopped, match=r"cannot be reached \(.+\) and nothing was sent; start the server"):
        asyncio.run(run())
    assert spent == [(0, 0)]
    assert sum(clock.slept) < 10
    assert set(rows(path)) == {"unreachable"}
    with open_store(path) as store:  # nor does a later run count it
        assert Account(store).tokens == 0


def test_a_server_that_stops_later_is_waited_for(serve, tmp_path):
    server = serve(respond=respond)

    async def ask(client: Client) -> None:
        await client.ask(request("first"))
        server.stop()
        vars(client._transport)["_openai"] = new_openai(config(server), "none")  # without the open connection
        await client.ask(request("second"))

    with pytest.raises(Unanswered, match="no reply in 8 attempts, the last one: unreachable"):
        talk(tmp_path / "store.sqlite", server, ask, Clock())


@pytest.mark.parametrize("make", [lambda url: LlmConfig("m", base_url=url), lambda url: JudgeConfig(base_url=url)])
@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:8000/v1", "begin it with http:// or https://"),
        ("127.0.0.1:8000", "begin it with http:// or https://"),
        ("", "begin it with http:// or https://"),
        ("ftp://host/v1", "begin it with http:// or https://"),
        ("http://", "names no host"),
        ("http://a host/v1", "contains a space"),
        ("http://host:port/v1", "give a URL such as"),
        ("http://host:99999/v1", "give a URL such as"),
        ("http://host/v1?key=1", "leave out what follows the path"),
        ("http://host/v1/chat/completions", "leave out /chat/completions"),
    ],
)
def test_a_wrong_url_raises_with_the_remedy(make, url, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(url)
    assert make("http://127.0.0.1:8000/v1").base_url == "http://127.0.0.1:8000/v1"
