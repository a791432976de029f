"""A vision-language model behind an OpenAI-compatible endpoint, such as vLLM's, SGLang's or llama.cpp's server."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import threading
import time
from collections.abc import Coroutine, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import aiohttp

from paradiffusion.errors import UserError
from paradiffusion.metrics.vlm import Answer, Decoding, Question
from paradiffusion.randomness import uniform

T = TypeVar("T")
_LATER: Final = (408, 409, 425, 429)  # and all from 500 on
_LONGEST_WAIT = 60.0
_LONGEST_PAUSE: Final = 600.0  # that a server may ask for
_LOOK_AROUND = 0.5  # seconds between looks at signals


@dataclass(frozen=True)
class Address:
    """Where the server is and how it is treated.

    Attributes:
        url: up to and with /v1.
        served: the model's name there; None where it serves only one.
        api_key_env: the environment variable that holds the key.
        concurrency: requests at once.
        timeout: seconds that one answer may take.
        tries: how often a request is sent before the server counts as gone.
        wait: seconds before the second try, doubled each time.
    """

    url: str
    served: str | None = None
    api_key_env: str | None = None
    concurrency: int = 32
    timeout: float = 300.0
    tries: int = 8
    wait: float = 1.0


class Later(Exception):
    """A failure that may pass: how, and how long the server asks to wait (seconds, 0 where it does not say)."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.reason, self.wait = reason, wait


class EndpointModel:
    """The engine ``endpoint``; see Engine for what it does.

    Raises:
        UserError: where the address or key is wrong, nobody answers there, or the model is not served.
    """

    device = "endpoint"
    batch_size = 1

    def __init__(self, address: Address, decoding: Decoding) -> None:
        check_address(address)
        self._address, self._decoding = address, decoding
        self._url = address.url.rstrip("/")
        self._headers = headers_of(address)
        # A thread of its own, so that requests go on while the next picture is decoded.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._session = self._run(self._open()).result()
        try:
            self.model = self._run(self._find_model()).result()
        except BaseException:
            self.close()
            raise
        self.revision = "served"

    def answers(self, batches: Iterator[list[Question]]) -> Iterator[list[tuple[Question, Answer]]]:
        """One by one, as they come, with ``concurrency`` requests under way."""
        questions = (question for batch in batches for question in batch)
        running: dict[Future[Answer], Question] = {}
        try:
            while True:
                while len(running) < self._address.concurrency and (question := next(questions, None)) is not None:
                    running[self._run(self._ask(question))] = question
                if not running:
                    return
                done, _ = wait(running, timeout=_LOOK_AROUND, return_when=FIRST_COMPLETED)
                yield [(running.pop(future), future.result()) for future in done]
        finally:
            for future in running:
                future.cancel()

    def close(self) -> None:
        """Close the connections."""
        if self._thread.is_alive():
            self._run(self._session.close()).result()
            self._run(self._loop.shutdown_default_executor()).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _open(self) -> aiohttp.ClientSession:
        timeout = aiohttp.ClientTimeout(total=self._address.timeout, connect=min(30.0, self._address.timeout))
        connector = aiohttp.TCPConnector(limit=self._address.concurrency)
        return aiohttp.ClientSession(timeout=timeout, connector=connector, headers=self._headers)

    async def _find_model(self) -> str:
        """The name to ask for, once the server says that it has it. Not all servers list their models."""
        served = self._address.served
        status, body = await self._patiently(
            lambda: self._request("GET", "/models"), "the list of models", min(3, self._address.tries)
        )  # a wrong address is told soon
        listed = body.get("data") if status == 200 else None
        listed = listed if isinstance(listed, list) else []
        names = [str(one["id"]) for one in listed if isinstance(one, dict) and "id" in one]
        if served is None and len(names) != 1:
            raise UserError(
                f"endpoint={self._address.url} serves {', '.join(names) or 'no models that it lists'}; name one with served=."
            )
        if served is not None and names and served not in names:
            raise UserError(f"served={served} is not served at {self._address.url}; it has {', '.join(names)}.")
        return served or names[0]

    async def _ask(self, question: Question) -> Answer:
        payload = await asyncio.to_thread(self._payload, question)  # encoding pictures would hold up the other requests

        async def once() -> Answer:
            status, body = await self._request("POST", "/chat/completions", payload)
            if status != 200:
                return Answer(error=f"status {status}: {self._message(body)}")
            return _read(body)

        return await self._patiently(once, f"row {question.row}")

    async def _patiently(self, once: Any, what: str, tries: int | None = None) -> Any:
        """``await once()``, again after a while as long as it raises Later."""
        reason, tries = "", tries or self._address.tries
        for attempt in range(tries):
            try:
                return await once()
            except Later as later:
                reason = later.reason
                if attempt + 1 < tries:
                    # Spread by up to a half, so that refused requests do not come back all at once.
                    wait = self._address.wait * 2**attempt * (1 + uniform("wait", what, attempt) / 2)
                    await asyncio.sleep(max(min(_LONGEST_WAIT, wait), later.wait))
        raise UserError(
            f"the server at {self._address.url} failed {tries} times ({reason}); see that it runs and has room, "
            "then run the same command again: it goes on where it stopped."
        )

    async def _request(
        self, method: str, path: str, payload: dict[str, Any] | None = None
    ) -> tuple[int, dict[str, Any]]:
        """(status, body). Raises Later for what may pass, UserError for what no picture can change."""
        try:
            # A redirect could carry key and pictures to somewhere else.
            async with self._session.request(method, self._url + path, json=payload, allow_redirects=False) as response:
                raw, status = await response.read(), response.status
                pause = response.headers.get("Retry-After", "")
        except aiohttp.ClientConnectorCertificateError as error:
            reason = str(error.certificate_error).rstrip(".")
            raise UserError(
                f"the certificate of {self._url} is not trusted ({reason}); use the name that it was issued for, or let "
                "SSL_CERT_FILE name a file with the authority that signed it."
            ) from None
        except TimeoutError:
            raise Later(f"no answer within {self._address.timeout:g} s") from None
        except aiohttp.ClientError as error:
            raise Later(str(error) or type(error).__name__) from None
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError):
            body = None
        if status in _LATER or status >= 500:
            raise Later(f"status {status}: {self._message(body)}", _pause(pause))
        if status == 402:  # which would befall every picture from here on
            raise UserError(
                f"the server at {self._address.url} wants to be paid (status 402: {self._message(body)}); see to the account, then run "
                "the same command again: it goes on where it stopped."
            )
        if status in (401, 403):
            held = f"the key in {self._address.api_key_env}" if self._address.api_key_env else "requests without a key"
            raise UserError(
                f"the server at {self._address.url} refuses {held} (status {status}); name the environment variable that holds "
                "a valid key with api_key_env=."
            )
        if (status == 404 and method == "POST") or 300 <= status < 400:
            raise UserError(
                f"the server at {self._address.url} has no {path} for the model {payload and payload['model']} (status {status}: "
                f"{self._message(body)}); check endpoint=, which ends in /v1 for most servers, and served=."
            )
        if status == 200 and not isinstance(body, dict):
            raise Later("an answer that is no JSON object")
        return status, body if isinstance(body, dict) else {}

    def _message(self, body: Any) -> str:
        """What a server says about an error, in whichever of the usual places, but for the key if it repeats that."""
        error = body.get("error", body) if isinstance(body, dict) else body
        message = error.get("message", error.get("detail", "")) if isinstance(error, dict) else error
        said = " ".join(str(message or "no reason given").split())
        key = self._headers.get("Authorization", "").removeprefix("Bearer ")
        return (said.replace(key, "***") if key else said)[:200]

    def _payload(self, question: Question) -> dict[str, Any]:
        buffer = io.BytesIO()
        question.image.save(buffer, "JPEG", quality=95)
        picture = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
        content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": question.prompt}]
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self._decoding.max_new_tokens,
            "temperature": question.temperature,
            "top_p": self._decoding.top_p if question.temperature > 0 else 1.0,
            "seed": question.seed % (1 << 31),  # servers keep it in 32 or 64 bits, with a sign
        }


def check_address(address: Address) -> None:
    """Raise UserError for a URL that is none, or a key that is not there; nobody is asked."""
    try:
        parts = urlsplit(address.url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # half an IPv6 address, a port that is no number
        usable = False
    if not usable:
        raise UserError(f"endpoint={address.url} is no address; expected one such as http://localhost:8000/v1.")
    if parts.username is not None or parts.query:  # the address is told in messages and logs
        raise UserError(
            f"endpoint= holds more than the address of {parts.hostname} (a user name, a key or a query); leave that out, and "
            "name the environment variable that holds the key with api_key_env=."
        )
    headers_of(address)


def headers_of(address: Address) -> dict[str, str]:
    """With the server's key, where it wants one. Raises UserError where the variable that is to hold it is not set."""
    if address.api_key_env is None:
        return {}
    key = os.environ.get(address.api_key_env, "").strip()  # read from a file, keys end with the line's end
    if not key:
        raise UserError(
            f"api_key_env={address.api_key_env} names an environment variable that is not set; export it with the server's key."
        )
    if not (key.isascii() and key.isprintable()):
        raise UserError(
            f"the key in {address.api_key_env} holds characters that no header can carry; export it again, on one line."
        )
    return {"Authorization": f"Bearer {key}"}


def _pause(retry_after: str) -> float:
    """Seconds that a Retry-After header asks to wait: a number, or a date; 0 for anything else."""
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (ValueError, TypeError, IndexError, OverflowError):
            return 0.0
    return min(_LONGEST_PAUSE, seconds) if seconds > 0 else 0.0


def _read(body: dict[str, Any]) -> Answer:
    """The answer in a chat completion; Later where it is none, as when a server falls over in the middle."""
    try:
        choice = body["choices"][0]
        text = choice["message"]["content"]
        if isinstance(text, list):  # in parts, as the protocol allows
            text = "".join(part["text"] for part in text if part.get("type", "text") == "text")
        if text is not None and not isinstance(text, str):
            raise TypeError
        tokens = (body.get("usage") or {}).get("completion_tokens") or 0
        return Answer(text or "", int(tokens), choice.get("finish_reason") != "length")
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError):
        raise Later("an answer that is no chat completion") from None
