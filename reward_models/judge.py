"""Another model's grade as reward, over any OpenAI-compatible API: cached, rate-limited, retried, with a budget.

What is asked is `judge_prompt.txt`. What the policy wrote is in it as data between marks that it cannot know, since
they are the hash of the data; a judge may still fall for what is said there: see the card in README.md.
"""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
import threading
import time
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from atp_rl.model.service import Service
from atp_rl.types import InputError, Message
from reward_models.completions import Completion
from reward_models.preference import conversation

_SECTION = "evolve.reward_options.judge"
ANSWER_TOKENS = 512
"""The longest answer that is asked for: a grade takes a few tokens, and a judge that thinks first has some room."""
_GRADE = re.compile(r"0|1|[01]?\.\d+|[01]\.")


class Judge:
    """Asks a service for a grade of each reply; the same question is only ever asked once."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        cache: str | Path,
        api_key_env: str | None = None,
        requests_per_minute: float | None = None,
        max_requests: int | None = None,
        max_tokens: int | None = None,
        timeout_s: float = 120.0,
        concurrency: int = 16,
    ) -> None:
        """Nothing is sent or written yet.

        Args:
            url: root of the API, e.g. `http://127.0.0.1:8000/v1`.
            model: its name there.
            cache: SQLite file of the answers and of what was spent. A run that is resumed with it asks nothing again.
            api_key_env: name of the environment variable that holds the key.
            requests_per_minute: questions are sent no faster; a retry waits for what the service asks instead.
            max_requests, max_tokens: the budget of this cache; retries of a failed request do not count, a question
                under way when its process was killed does.
            timeout_s, concurrency: as in `Service`.

        Raises:
            InputError: no key, or no client is installed.
        """
        self.service = Service(
            url, api_key_env=api_key_env, timeout_s=timeout_s, concurrency=concurrency, section=_SECTION
        )
        self.model, self.max_tokens = model, max_tokens
        self.answers = Answers(Path(cache), max_requests, max_tokens)
        self._pace = Pace(requests_per_minute)
        self.metrics: dict[str, float] = {}
        self.__name__ = "judge"  # TRL's name of the metric

    def __call__(
        self,
        prompts: Sequence[str | Sequence[Message]],
        completions: Sequence[Completion],
        options: Sequence[Sequence[str] | None] | None = None,
        **_: Any,
    ) -> list[float | None]:
        """A grade in [0, 1] of each reply; None where the judge could not tell, or said anything but a number.

        Args:
            prompts: conversations; a plain text is the message of a user.
            options: a row where they are None is another task's and gets None.

        Raises:
            InputError: the budget is spent, or the service fails. What was answered until then is kept.
        """
        begun = time.perf_counter()
        wanted = [i for i in range(len(prompts)) if options is None or options[i] is not None]
        questions = {i: question(conversation(prompts[i], completions[i])) for i in wanted}
        asked = list(dict.fromkeys(questions.values()))
        grades = dict(zip(asked, map(grade, self.service.each(self._answer, asked)), strict=True))
        known = [grades[questions[i]] for i in wanted]
        requests, tokens = self.answers.spent()
        self.metrics = {
            "seconds": time.perf_counter() - begun,
            "unknown": sum(value is None for value in known) / max(1, len(known)),
            "requests": requests,
            "tokens": tokens,
        }
        return [grades[questions[i]] if i in questions else None for i in range(len(prompts))]

    def _answer(self, text: str) -> str:
        """From the cache, or from the service."""
        key = hashlib.sha256(json.dumps([self.service.url.rstrip("/"), self.model, text]).encode()).hexdigest()
        if (known := self.answers.get(key)) is not None:
            return known
        self.answers.reserve()
        self._pace.wait()
        message = {"role": "user", "content": text}
        body = {"model": self.model, "messages": [message], "temperature": 0, "max_tokens": ANSWER_TOKENS}
        raw = self.service.post("/chat/completions", body)
        try:
            said = raw["choices"][0]["message"]["content"] or ""
            tokens = int((raw.get("usage") or {}).get("total_tokens", 0))
            if not isinstance(said, str):
                raise TypeError
        except (LookupError, TypeError, ValueError, AttributeError):
            raise InputError(
                f"{self.service.url}: the server's answer is no chat completion: {str(raw)[:200]}"
            ) from None
        if self.max_tokens is not None and tokens == 0:
            raise InputError(
                f"`{_SECTION}.max_tokens`: {self.service.url} does not count tokens; set max_requests instead"
            )
        self.answers.put(key, said, tokens)
        return said


def question(messages: Sequence[Message]) -> str:
    """What the judge is asked about a conversation that ends with the reply."""
    read = "\n".join(json.dumps(dict(message), ensure_ascii=False) for message in messages[:-1])
    reply = json.dumps(messages[-1]["content"], ensure_ascii=False)
    mark = "#" + hashlib.sha256(f"{read}\n{reply}".encode()).hexdigest()[:16]
    return _template().substitute(mark=mark, conversation=read, reply=reply)


@cache
def _template() -> Template:
    return Template((files("reward_models") / "judge_prompt.txt").read_text("utf-8"))


def grade(answer: str) -> float | None:
    """An answer that is a number from 0 to 1 and nothing else; None for any other."""
    text = answer.strip()
    if not _GRADE.fullmatch(text):
        return None
    value = float(text)
    return value if value <= 1 else None


class Answers:
    """The answers that a service gave, and how much of the budget is spent: an SQLite file, safe against kill -9."""

    def __init__(self, file: Path, max_requests: int | None, max_tokens: int | None) -> None:
        self.file, self.max_requests, self.max_tokens = file, max_requests, max_tokens
        self._lock = threading.Lock()
        self._opened: sqlite3.Connection | None = None

    def get(self, key: str) -> str | None:
        rows = self._run("SELECT answer FROM answers WHERE key = ?", key)
        return rows[0][0] if rows else None

    def put(self, key: str, answer: str, tokens: int) -> None:
        self._run("INSERT OR REPLACE INTO answers VALUES (?, ?)", key, answer)
        self._run("UPDATE spent SET tokens = tokens + ?", tokens)

    def spent(self) -> tuple[int, int]:
        """Requests and tokens."""
        return self._run("SELECT requests, tokens FROM spent")[0]

    def reserve(self) -> None:
        """Take one request from the budget; raises InputError when it is spent."""
        taken = self._run(
            "UPDATE spent SET requests = requests + 1 WHERE requests < ? AND tokens < ? RETURNING requests",
            self.max_requests or 2**62,
            self.max_tokens or 2**62,
        )
        if not taken:
            requests, tokens = self.spent()
            limits = {"max_requests": self.max_requests, "max_tokens": self.max_tokens}
            shown = " and ".join(f"`{_SECTION}.{name}` {limit}" for name, limit in limits.items() if limit)
            raise InputError(
                f"the judge's budget is spent: {requests} requests and {tokens} tokens, of {shown}. Raise it in the "
                f"run's recipe.yaml and `atp resume` the run: the answers are kept in {self.file}"
            )

    def _run(self, statement: str, *values: Any) -> list[Any]:
        with self._lock:
            try:
                if self._opened is None:
                    self.file.parent.mkdir(parents=True, exist_ok=True)
                    self._opened = sqlite3.connect(self.file, timeout=60, isolation_level=None, check_same_thread=False)
                    self._opened.executescript(
                        "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL);"
                        "CREATE TABLE IF NOT EXISTS spent (one INTEGER PRIMARY KEY CHECK (one = 1),"
                        " requests INTEGER NOT NULL, tokens INTEGER NOT NULL);"
                        "INSERT OR IGNORE INTO spent VALUES (1, 0, 0);"
                    )
                return self._opened.execute(statement, values).fetchall()
            except (sqlite3.Error, OSError) as error:
                raise InputError(f"`{_SECTION}.cache` {self.file}: {error}") from None


class Pace:
    """Lets so many pass in a minute, evenly; None lets all pass at once."""

    def __init__(self, per_minute: float | None) -> None:
        self.gap_s = 60 / per_minute if per_minute else 0.0
        self._next, self._lock = 0.0, threading.Lock()

    def wait(self) -> None:
        """Until it is this caller's turn."""
        with self._lock:
            turn = max(time.monotonic(), self._next)
            self._next = turn + self.gap_s
        time.sleep(max(0.0, turn - time.monotonic()))
