"""An OpenAI-compatible server on 127.0.0.1 whose replies follow rules, without a model. It can inject faults.

    python scripts/loopback_llm.py --port 8123 --faults 0.2 --latency 0.05

It replaces a hosted endpoint in tests, in `measure_translation_kills.py`, and when you try out `bimedix data translate`
before you spend money (`--llm.base-url http://127.0.0.1:8123/v1`). The same request always gets the same answer. GET
/stats returns how often requests were answered (`twice` must stay 0).
"""

import argparse
import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from bimedix_jax.curation.checks import lexicon
from bimedix_jax.errors import natural, run_script

Body = dict[str, Any]

# faults that replace a good answer; `429:1` and `429:200` have a Retry-After header
FAULTS = (
    *("429:1", "429:200", "500", "hang", "cut", "truncated_body"),
    *("truncated_json", "length", "content_filter", "ignored_schema", "no_usage"),
)
# faults with a reply that is paid for and cannot be used
PAID_FAULTS = {"truncated_json", "length", "content_filter", "ignored_schema"}
HANG_SECONDS = 60.0

SYLLABLES = ("را", "سو", "مي", "نا", "لو", "كي", "دا", "بو", "تي", "فا", "حو", "جي", "صا", "قو", "طي", "عا")
NEGATIONS = {
    "no": "لا",
    "not": "ليس",
    "without": "دون",
    "never": "أبدا",
    "none": "لا",
    "cannot": "لا",
    "neither": "ولا",
}
SPACED = re.compile(r"(\s+)")
WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")
UNITS = {"mg", "kg", "ml", "mcg", "mmhg", "mmol", "meq", "cm", "mm", "dl", "iu", "ng", "pg", "hz", "kpa", "g", "l", "u"}


def digest(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


def pseudo_arabic(text: str, salt: str = "", keep: frozenset[str] = frozenset()) -> str:
    """English words in Arabic letters, by hash; numbers, units, acronyms such as HIV, marks and `keep` are kept."""

    def word(match: re.Match[str]) -> str:
        found = match[0]
        lower = found.lower()
        if lower in NEGATIONS:
            return NEGATIONS[lower]
        if lower in UNITS or lower in keep or (len(found) > 1 and found.isupper()):
            return found
        number = digest(lower, salt)
        made = "".join(SYLLABLES[number >> 4 * i & 15] for i in range(1 + len(found) // 3))
        return (lexicon.rendering(lower) or "") + made  # a check compares the words that the lexicon knows

    # a word with a digit (B12, 5mg) is kept
    pieces = SPACED.split(text)
    return "".join(p if not p or p.isspace() or re.search(r"[0-9<>/@=]", p) else WORD.sub(word, p) for p in pieces)


def fenced(text: str) -> dict[str, str]:
    """The fenced texts of a prompt by label."""
    return {match[1]: match[3] for match in re.finditer(r"<(\w+) ([0-9a-f]{12})>\n(.*?)\n</\1 \2>", text, re.DOTALL)}


def consultation(question: str, plan: str, present: str) -> Body:
    """A chat of the drawn shape, in words of the question, with the right choice in the turn of the answer."""
    right = re.findall(r"^(?:Answer|الإجابة): [A-J]\. (.*)$", question, re.MULTILINE)[-1]
    words = [word for word in WORD.findall(question) if word.casefold() not in right.casefold()] or ["pain"]
    turns = []
    for number, turn in enumerate(json.loads(plan)["turns"]):
        some = [words[digest(question, present, number, place) % len(words)] for place in range(8)]
        text = f"{' '.join(some)} {number}"
        if turn["language"] == "ar":
            text = f"{pseudo_arabic(' '.join(some).lower())} {number}"
        if turn["purpose"].startswith("gives the answer"):
            text = f"{text}: {right}"
        mark = "?" if turn["purpose"].startswith("asks") else "."
        turns.append({"speaker": turn["speaker"], "language": turn["language"], "text": text + mark})
    return {"turns": turns}


def arrived_at(question: str, dialogue: str) -> str:
    """The letter of the longest choice that occurs in a chat, or "none"."""
    choices = re.findall(r"^([A-J])\. (.*)$", question, re.MULTILINE)
    held = [(len(text), letter) for letter, text in choices if text and text in dialogue]
    return max(held)[1] if held else "none"


def answer(body: Body) -> str:
    """The reply to a prompt of `bimedix data translate` or `bimedix data chats`; for other prompts a hash of them."""
    parts = fenced(body["messages"][-1]["content"])
    if "plan" in parts:
        chat = consultation(parts["question"], parts["plan"], parts.get("dialogue", ""))
        return json.dumps(chat, ensure_ascii=False)
    if "dialogue" in parts:
        letter = arrived_at(parts["question"], parts["dialogue"])
        return json.dumps({"choice": letter, "problems": [], "score": 75 + digest(parts["dialogue"]) % 26})
    if "pairs" in parts:
        number = digest(parts["pairs"]) % 101
        score = 60 + number * 40 // 100
        spelled = [score, f"{score}/100", str(score).translate(str.maketrans("0123456789", "٠١٢٣٤٥٦٧٨٩")), score - 0.5]
        return json.dumps({"problems": ["a term"] if score < 80 else [], "score": spelled[number % 4]})
    if "source" in parts:
        salt = parts.get("translation", "")
        segments = json.loads(parts["source"])["segments"]
        missing = re.findall(r"^- drug_names.*missing: (.*)$", body["messages"][-1]["content"], re.MULTILINE)
        keep = frozenset(word.casefold() for names in missing for word in WORD.findall(names))
        done = [{"id": item["id"], "text": pseudo_arabic(item["text"], salt, keep)} for item in segments]
        return json.dumps({"segments": done}, ensure_ascii=False)
    return json.dumps({"reply": digest(json.dumps(body, sort_keys=True))})


class Server(ThreadingHTTPServer):
    """`respond(body)` gives the reply's text, `fault(body, nth)` a name of FAULTS or None for the nth such request."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(
        self,
        respond: Callable[[Body], str] = answer,
        fault: Callable[[Body, int], str | None] = lambda body, nth: None,
        port: int = 0,
        latency: float = 0.0,
    ) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.respond, self.fault, self.latency = respond, fault, latency
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.lock = threading.Lock()
        self.bodies: list[Body] = []
        self.keys: list[str] = []  # Authorization of each request
        self.received: Counter[str] = Counter()
        self.good: Counter[str] = Counter()
        self.open = self.most_open = 0
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, Body] = {}
        self.ending = threading.Event()

    def start(self) -> "Server":
        """Serve in a thread."""
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def stop(self) -> None:
        """Stop serving, and end requests that hang."""
        self.ending.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing: clients that are killed are expected."""

    def stats(self) -> Body:
        with self.lock:
            twice = {key: count - 1 for key, count in self.good.items() if count > 1}
            return {
                "received": sum(self.received.values()),
                "distinct": len(self.received),
                "answered": sum(self.good.values()),
                "twice": sum(twice.values()),
                "most_open": self.most_open,
            }

    def complete(self, body: Body) -> tuple[str | None, Body]:
        """Count a request, and return its fault (or None) and chat completion."""
        key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        with self.lock:
            self.bodies.append(body)
            nth = self.received[key]
            self.received[key] += 1
        fault = self.fault(body, nth)
        text, finish = self.respond(body), "stop"
        if fault in ("truncated_json", "length"):
            text = text[: max(1, len(text) * 2 // 3)]
        if fault in ("length", "content_filter"):
            finish = fault
        if fault == "content_filter":
            text = ""
        if fault == "ignored_schema":
            text = "Certainly! Here is what you asked for."
        if fault is None or fault == "no_usage":
            with self.lock:
                self.good[key] += 1
        prompt = sum(len(message["content"]) for message in body["messages"]) // 4
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": len(text) // 3,
            "total_tokens": prompt + len(text) // 3,
            "prompt_tokens_details": {"cached_tokens": prompt // 2},
        }
        message = {"role": "assistant", "content": text}
        value: Body = {
            "id": key[:12],
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        }
        return fault, value if fault == "no_usage" else {**value, "usage": usage}

    def run_batch(self, name: str) -> None:
        """Answer all lines of a batch; faults without a completion become errors of their line."""
        batch = self.batches[name]
        lines = []
        for line in self.files[batch["input_file_id"]].decode().splitlines():
            row = json.loads(line)
            fault, value = self.complete(row["body"])
            status = 200 if fault is None or fault in PAID_FAULTS or fault == "no_usage" else 500
            response = {"status_code": status, "body": value if status == 200 else {"error": {"message": str(fault)}}}
            lines.append(json.dumps({"custom_id": row["custom_id"], "response": response, "error": None}))
        lines.reverse()  # results come in any order
        self.files[f"{name}-output"] = "\n".join(lines).encode()
        batch.update(status="completed", output_file_id=f"{name}-output")


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Print nothing."""

    def setup(self) -> None:
        """Turn off Nagle's algorithm: small replies in pieces would otherwise wait for acknowledgements (40 ms)."""
        super().setup()
        import socket

        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def do_GET(self) -> None:
        server = self.server
        path = self.path.split("?")[0]
        if path == "/stats":
            self.send(200, server.stats())
        elif path == "/v1/batches":
            newest = list(server.batches.values())[::-1]
            self.send(200, {"object": "list", "data": newest, "has_more": False})
        elif path.startswith("/v1/batches/"):
            self.send(200, server.batches[path.rsplit("/", 1)[1]])
        elif path.startswith("/v1/files/") and path.endswith("/content"):
            self.send_bytes(200, server.files[path.split("/")[3]])
        else:
            self.send(404, {"error": {"message": f"there is nothing at {path}"}})

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        server = self.server
        if self.path == "/v1/files":
            boundary = b"--" + self.headers["Content-Type"].split("boundary=")[1].encode()
            part = next(part for part in data.split(boundary) if b'name="file"' in part)
            name = f"file-{len(server.files)}"
            server.files[name] = part.split(b"\r\n\r\n", 1)[1].removesuffix(b"\r\n")
            self.send(200, {"id": name, "object": "file", "bytes": len(data), "created_at": 0, "purpose": "batch"})
        elif self.path == "/v1/batches":
            name = f"batch-{len(server.batches)}"
            batch = {**json.loads(data), "id": name, "object": "batch", "status": "in_progress", "created_at": 0}
            server.batches[name] = batch
            threading.Timer(server.latency, server.run_batch, [name]).start()
            self.send(200, batch)
        elif self.path == "/v1/chat/completions":
            self.chat(json.loads(data))
        else:
            self.send(404, {"error": {"message": f"there is nothing at {self.path}"}})

    def chat(self, body: Body) -> None:
        server = self.server
        server.keys.append(self.headers.get("Authorization", ""))
        with server.lock:
            server.open += 1
            server.most_open = max(server.most_open, server.open)
        try:
            if server.latency:
                time.sleep(server.latency * (0.5 + digest(json.dumps(body)) % 1000 / 1000))
            fault, value = server.complete(body)
        finally:
            with server.lock:
                server.open -= 1
        if fault is not None and fault[0].isdigit():
            status, _, wait = fault.partition(":")
            error = {"error": {"message": f"made to fail with {fault}", "code": None}}
            self.send(int(status), error, {"Retry-After": wait} if wait else {})
        elif fault == "hang":
            server.ending.wait(HANG_SECONDS)
            self.close_connection = True
        elif fault == "cut":
            self.send_bytes(200, json.dumps(value).encode()[:20], length=1000)
            self.close_connection = True
        elif fault == "truncated_body":
            self.send_bytes(200, json.dumps(value).encode()[:-30])
        else:
            self.send(200, value)

    def send(self, status: int, value: Body, headers: dict[str, str] | None = None) -> None:
        self.send_bytes(status, json.dumps(value, ensure_ascii=False).encode(), headers=headers)

    def send_bytes(self, status: int, data: bytes, headers: dict[str, str] | None = None, length: int = 0) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(length or len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def some_faults(share: float) -> Callable[[Body, int], str | None]:
    """The share of requests whose first attempt gets a fault that a retry corrects."""
    kinds = ("429:0", "500", "cut", "truncated_body", "truncated_json", "content_filter", "ignored_schema", "no_usage")

    def fault(body: Body, nth: int) -> str | None:
        number = digest(json.dumps(body, sort_keys=True))
        return kinds[number // 1000 % len(kinds)] if nth == 0 and number % 1000 < share * 1000 else None

    return fault


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--port", type=natural, default=8123, help="0: any free port; the first line printed is the URL"
    )
    parser.add_argument("--latency", type=float, default=0.0, help="seconds per answer, give or take a half")
    parser.add_argument("--faults", type=float, default=0.0, help="share of requests that fail the first time")
    arguments = parser.parse_args()
    server = Server(fault=some_faults(arguments.faults), port=arguments.port, latency=arguments.latency)
    print(server.url, flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print(json.dumps(server.stats()))


if __name__ == "__main__":
    run_script(main)
