"""A connection to an OpenAI-compatible server: retries and timeouts are the `openai` client's, errors are put plainly.

The client is used for what it does on the wire alone: answers are read as plain JSON and checked by those who asked,
since servers differ in what they add and leave out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from atp_rl.types import InputError

RETRIES = 4
"""Further tries after a lost connection, a timeout, or a status 408, 409, 429 or 5xx; with growing pauses."""

T = TypeVar("T")
R = TypeVar("R")


class Service:
    """Posts JSON to one server, from several threads at once."""

    def __init__(
        self,
        url: str,
        *,
        api_key_env: str | None = None,
        timeout_s: float = 120,
        concurrency: int = 64,
        section: str = "sampler",
    ):
        """Make a connection; nothing is sent yet.

        Args:
            section: of the recipe that holds the other arguments, for messages.
            url: of the API's root, e.g. `http://127.0.0.1:8000/v1`.
            api_key_env: name of the environment variable that holds the key; None for a server that asks for none.
            timeout_s: how long one try may take.
            concurrency: requests under way at once.

        Raises:
            InputError: no client is installed, or there is no key.
        """
        try:
            import openai
        except ImportError:
            raise InputError(
                f"`{section}` asks a server and needs the openai client; `pip install 'atp-rl[served]'`"
            ) from None
        key = os.environ.get(api_key_env, "") if api_key_env else "none"
        if not key:
            raise InputError(
                f"`{section}.api_key_env`: the environment variable {api_key_env} is not set; export the key"
            )
        self.url, self.timeout_s, self.concurrency, self.section = url, timeout_s, concurrency, section
        self._client = openai.OpenAI(base_url=url, api_key=key, timeout=timeout_s, max_retries=RETRIES)

    def get(self, path: str) -> Any:
        return self._plainly(path, lambda: self._client.get(path, cast_to=object))

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The answer's JSON; its text where it is no JSON.

        Raises:
            InputError: no answer, or an error, also after all retries.
        """
        return self._plainly(path, lambda: self._client.post(path, body=body, cast_to=object))

    def each(self, ask: Callable[[T], R], questions: Sequence[T]) -> list[R]:
        """`ask` of every question, several at once, in order; the first error ends it."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(ask, questions))

    def _plainly(self, path: str, call: Callable[[], Any]) -> Any:
        import openai

        at = f"{self.url.rstrip('/')}{path}"
        try:
            return call()
        except openai.APITimeoutError:
            raise InputError(
                f"{at}: no answer within {self.timeout_s:g} s, {RETRIES + 1} times; raise `{self.section}.timeout_s`, "
                f"or lower `{self.section}.concurrency`"
            ) from None
        except openai.APIConnectionError as error:
            why = error.__cause__ or error
            raise InputError(f"{at}: no server answers ({why}); start it, or correct `{self.section}.url`") from None
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise InputError(
                f"{at}: the server refuses the key ({error.status_code}); name the variable that holds a valid one in "
                f"`{self.section}.api_key_env`"
            ) from None
        except openai.APIStatusError as error:
            hint = f"; is `{self.section}.url` the root of its API?" if error.status_code == 404 else ""
            raise StatusError(error.status_code, f"{at}: the server answers {error.message[:500]}{hint}") from None
        except json.JSONDecodeError as error:
            raise InputError(f"{at}: the server's answer is no valid JSON ({error})") from None


class StatusError(InputError):
    """The server answered with an error, also after all retries."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
