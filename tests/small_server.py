"""An engine with the small model, and a server of it that speaks the used part of vLLM's protocol. No test itself.

Both really load the adapters that they are sent: each becomes a model of its own, read from its files by PEFT.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from atp_rl.model.policy import load_base


class SmallEngine:
    """Draws and scores tokens with a base model and any number of adapters by name."""

    def __init__(self, base: str) -> None:
        self.base, self.lock = base, threading.Lock()
        self.models: dict[str, torch.nn.Module] = {base: load_base(base).eval()}

    def load(self, name: str, folder: str) -> None:
        self.models[name] = PeftModel.from_pretrained(load_base(self.base), folder).eval()  # type: ignore[arg-type]

    def unload(self, name: str) -> None:
        del self.models[name]

    def draw(
        self, name: str, ids: Sequence[int], *, most: int, temperature: float, seed: int, stop: Sequence[int]
    ) -> tuple[list[int], list[float]]:
        """Tokens after `ids`, and their log-probabilities after the temperature."""
        generator = torch.Generator().manual_seed(seed)
        row, logprobs = list(ids), []
        while len(row) < len(ids) + most:
            logp = (self._logits(name, row)[-1] / temperature).log_softmax(-1)
            row.append(int(torch.multinomial(logp.exp(), 1, generator=generator)))
            logprobs.append(logp[row[-1]].item())
            if row[-1] in stop:
                break
        return row[len(ids) :], logprobs

    def score(self, name: str, ids: Sequence[int]) -> list[float]:
        """Log-probability of each token from the second one on."""
        logp = self._logits(name, ids).log_softmax(-1)
        return logp[:-1].gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1).tolist()

    def _logits(self, name: str, ids: Sequence[int]) -> Tensor:
        with self.lock, torch.no_grad():
            return self.models[name](input_ids=torch.tensor([list(ids)])).logits[0].float()


class SmallServer:
    """What a test sees and sets of a running server."""

    def __init__(self, base: str) -> None:
        self.engine = SmallEngine(base)
        self.url = ""
        self.asked: list[tuple[str, dict[str, Any]]] = []
        """Path and body of every request, as it came in."""
        self.keys: set[str] = set()
        """The `Authorization` of all requests."""
        self.errors = 0
        """So many of the next requests are answered with `error_status`."""
        self.error_status = 500
        self.delay_s = 0.0
        self.leave_out: set[str] = set()
        """Fields of a completion that the server does not know."""
        self.raw: bytes | None = None
        """Sent in place of every completion."""
        self.keeps_old_weights = False
        """New names of the live adapter are answered with the weights that were loaded first."""
        self._first: torch.nn.Module | None = None
        self.loads_adapters = True
        self.says: Callable[[dict[str, Any]], dict[str, Any]] = lambda body: {"content": "I do not know."}
        """The message that answers a request for a chat completion."""
        self.tokens = 0
        """What every chat completion counts as used; 0 is left out."""

    @property
    def loaded(self) -> list[str]:
        """Names of all adapters that were ever loaded."""
        return [body["lora_name"] for path, body in self.asked if path.endswith("/load_lora_adapter")]

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        self.asked.append((path, body))
        time.sleep(self.delay_s)
        if self.errors:
            self.errors -= 1
            return self.error_status, b'{"error": {"message": "try again"}}'
        if path == "/v1/models":
            return 200, json.dumps({"object": "list", "data": [{"id": name} for name in self.engine.models]}).encode()
        if path == "/v1/load_lora_adapter" and self.loads_adapters:
            name = body["lora_name"]
            self.engine.load(name, body["lora_path"])
            if self.keeps_old_weights and "-policy-" in name:
                self._first = self._first or self.engine.models[name]
                self.engine.models[name] = self._first
            return 200, f"Success: LoRA adapter '{body['lora_name']}' added successfully.".encode()
        if path == "/v1/unload_lora_adapter" and self.loads_adapters:
            self.engine.unload(body["lora_name"])
            return 200, b"Success"
        if path == "/v1/completions":
            if body["model"] not in self.engine.models:
                return 404, json.dumps({"error": {"message": f"The model `{body['model']}` does not exist."}}).encode()
            return 200, self.raw or json.dumps(self._complete(body)).encode()
        if path == "/v1/chat/completions":
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant"} | self.says(body)}
            counted = {"usage": {"total_tokens": self.tokens}} if self.tokens else {}
            return 200, self.raw or json.dumps({"model": body["model"], "choices": [choice]} | counted).encode()
        return 404, b'{"detail": "Not Found"}'

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        ids: list[int] = body["prompt"]
        choice: dict[str, Any] = {"index": 0, "text": "(not to be read)", "prompt_token_ids": ids}
        if "prompt_logprobs" in body:
            scored = self.engine.score(body["model"], ids)
            listed = [{str(token): {"logprob": value, "rank": 1}} for token, value in zip(ids[1:], scored, strict=True)]
            choice |= {"prompt_logprobs": [None, *listed], "token_ids": [0]}
        else:
            drawn, logprobs = self.engine.draw(
                body["model"],
                ids,
                most=body["max_tokens"],
                temperature=body["temperature"],
                seed=body["seed"],
                stop=body["stop_token_ids"],
            )
            choice |= {"token_ids": drawn, "logprobs": {"token_logprobs": logprobs, "tokens": ["?"] * len(drawn)}}
        return {
            "id": "cmpl-0",
            "object": "text_completion",
            "model": body["model"],
            "choices": [{key: value for key, value in choice.items() if key not in self.leave_out}],
        }


@contextmanager
def serving(base: str) -> Iterator[SmallServer]:
    """A server on a free port of the loopback device, in threads of this process."""
    server = SmallServer(base)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(*server.answer(self.path, {}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._send(*server.answer(self.path, body))

        def parse_request(self) -> bool:
            parsed = super().parse_request()
            server.keys.add(self.headers["Authorization"])
            return parsed

        def _send(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json" if content[:1] == b"{" else "text/plain")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Threads(ThreadingHTTPServer):
        request_queue_size = 256
        daemon_threads = True

    with Threads(("127.0.0.1", 0), Handler) as http:
        server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
        thread = threading.Thread(target=http.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()
