"""A vision-language model behind an OpenAI-compatible endpoint, such as vLLM's, SGLang's or llama.cpp's server."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from email.utils import parsedate_to_datetime
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import openai
import tenacity

from paradiffusion.errors import UserError
from paradiffusion.metrics.vlm import Answer, Decoding, Question, VlmOptions

T = TypeVar("T")
_LATER: Final = (408, 409, 425, 429)  # and all from 500 on
_LONGEST_PAUSE: Final = 600.0  # that a server may ask for
_LOOK_AROUND: Final = 0.5  # seconds between looks at signals


class Later(Exception):
    """A failure that may pass: how, and how long the server asks to wait (seconds, 0 where it does not say)."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class EndpointModel:
    """The engine ``endpoint``; see Engine. UserError where the address or key is wrong, nobody answers, or the model is not served."""

    device = "endpoint"
    batch_size = 1

    def __init__(self, options: VlmOptions, decoding: Decoding) -> None:
        self.url, self._key = check_address(options), key_of(options)
        self._options, self._decoding = options, decoding
        self._client = openai.AsyncOpenAI(
            base_url=self.url,
            api_key=self._key or "none",
            max_retries=0,  # tenacity tries again, after a damaged answer too
            timeout=openai.Timeout(options.timeout, connect=min(30.0, options.timeout)),
            # A redirect or a proxy could carry key and pictures to somewhere else.
            http_client=openai.DefaultAsyncHttpxClient(follow_redirects=False, trust_env=False, verify=ssl.create_default_context()),
        )
        # What the environment holds for another server is not told to this one.
        absent = ["OpenAI-Organization", "OpenAI-Project", *([] if self._key else ["Authorization"])]
        self._headers: Any = dict.fromkeys(absent, openai.Omit())
        # A thread of its own, so that requests go on while the next picture is decoded.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
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
                while len(running) < self._options.concurrency and (question := next(questions, None)) is not None:
                    running[self._run(self._ask(question))] = question
                if not running:
                    return
                done, _ = wait(running, timeout=_LOOK_AROUND, return_when=FIRST_COMPLETED)
                yield [(running.pop(future), future.result()) for future in done]
        finally:
            for future in running:
                future.cancel()

    def close(self) -> None:
        if self._thread.is_alive():
            self._run(self._client.close()).result()
            self._run(self._loop.shutdown_default_executor()).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _find_model(self) -> str:
        """The name to ask for, once the server says that it has it. Not all servers list their models."""

        async def listed() -> list[str]:
            page = await self._client.models.list(extra_headers=self._headers)
            return [str(one.id) for one in getattr(page, "data", None) or [] if hasattr(one, "id")]

        served = self._options.served
        try:
            names = await self._patiently(listed, min(3, self._options.tries))  # a wrong address is told soon
        except openai.APIStatusError:
            names = []
        if served is None and len(names) != 1:
            raise UserError(f"endpoint={self.url} serves {', '.join(names) or 'no models that it lists'}; name one with served=.")
        if served is not None and names and served not in names:
            raise UserError(f"served={served} is not served at {self.url}; it has {', '.join(names)}.")
        return served or names[0]

    async def _ask(self, question: Question) -> Answer:
        payload = await asyncio.to_thread(self._payload, question)  # encoding pictures would hold up the other requests

        async def once() -> Answer:
            return _read(await self._client.chat.completions.create(**payload, extra_headers=self._headers))

        try:
            return await self._patiently(once, self._options.tries)
        except openai.APIStatusError as error:
            return Answer(error=f"status {error.status_code}: {self._message(error.body)}")

    async def _patiently(self, once: Callable[[], Awaitable[T]], tries: int) -> T:
        """``await once()``, again after a while where that may help; UserError for what no picture can change."""

        async def attempt() -> T:
            try:
                async with asyncio.timeout(self._options.timeout):  # the client's own starts anew with every byte
                    return await once()
            except (TimeoutError, openai.APITimeoutError):
                raise Later(f"no answer within {self._options.timeout:g} s") from None
            except openai.APIError as error:
                raise self._meant(error) from None
            except ValueError:
                raise Later("an answer that is no JSON object") from None

        # Spread by up to a half, so that refused requests do not come back all at once.
        first = self._options.retry_wait
        growing = tenacity.wait_exponential(first, max=40.0) + tenacity.wait_random_exponential(first / 2, max=20.0)
        again = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(Later),
            stop=tenacity.stop_after_attempt(tries),
            wait=lambda state: max(growing(state), state.outcome.exception().wait),  # type: ignore[union-attr]
            reraise=True,
        )
        try:
            return await again(attempt)
        except Later as later:
            raise UserError(
                f"the server at {self.url} failed {tries} times ({later}); see that it runs and has room, "
                "then run the same command again: it goes on where it stopped."
            ) from None

    def _meant(self, error: openai.APIError) -> Exception:
        """What to raise for a request that failed; the error itself where it is of this picture alone."""
        if not isinstance(error, openai.APIStatusError):  # nobody was reached
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                return Later(str(error.__cause__ or error) or type(error.__cause__).__name__)
            return UserError(
                f"the certificate of {self.url} is not trusted ({str(cause).rstrip('.')}); use the name that it was "
                "issued for, or let SSL_CERT_FILE name a file with the authority that signed it."
            )
        status, said, asked = error.status_code, self._message(error.body), error.request
        if status in _LATER or status >= 500:
            return Later(f"status {status}: {said}", _pause(error.response.headers.get("Retry-After", "")))
        if status == 402:  # which would befall every picture from here on
            told = (
                f"wants to be paid (status 402: {said}); see to the account, then run the same command again: it goes on where it stopped."
            )
        elif status in (401, 403):
            held = f"the key in {self._options.api_key_env}" if self._key else "requests without a key"
            told = f"refuses {held} (status {status}); name the environment variable that holds a valid key with api_key_env=."
        elif (status == 404 and asked.method == "POST") or 300 <= status < 400:
            told = (
                f"does not answer at {asked.url.path} (status {status}: {said}); check endpoint=, which ends in /v1 for most "
                "servers, and served=."
            )
        else:
            return error
        return UserError(f"the server at {self.url} {told}")

    def _message(self, body: Any) -> str:
        """What a server says about an error, in whichever of the usual places, but for the key if it repeats that."""
        message = body.get("message", body.get("detail", "")) if isinstance(body, dict) else body
        said = " ".join(str(message or "no reason given").split())
        return (said.replace(self._key, "***") if self._key else said)[:200]

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


def check_address(options: VlmOptions) -> str:
    """The server's URL, up to and with /v1. UserError for one that is none, or a key that is not there; nobody is asked."""
    url = str(options.endpoint)
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # half an IPv6 address, a port that is no number
        usable = False
    if not usable:
        raise UserError(f"endpoint={url} is no address; expected one such as http://localhost:8000/v1.")
    if parts.username is not None or parts.query:  # the address is told in messages and logs
        raise UserError(
            f"endpoint= holds more than the address of {parts.hostname} (a user name, a key or a query); leave that out, and "
            "name the environment variable that holds the key with api_key_env=."
        )
    key_of(options)
    return url


def key_of(options: VlmOptions) -> str:
    """The server's key, "" where it wants none. Raises UserError where the variable that is to hold it is not set."""
    if options.api_key_env is None:
        return ""
    key = os.environ.get(options.api_key_env, "").strip()  # read from a file, keys end with the line's end
    if not key:
        raise UserError(
            f"api_key_env={options.api_key_env} names an environment variable that is not set; export it with the server's key."
        )
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"the key in {options.api_key_env} holds characters that no header can carry; export it again, on one line.")
    return key


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


def _read(completion: Any) -> Answer:
    """The answer in a chat completion; Later where it is none, as when a server falls over in the middle."""
    try:
        choice = completion.choices[0]
        text = choice.message.content
        if isinstance(text, list):  # in parts, as the protocol allows
            text = "".join(part["text"] for part in text if part.get("type", "text") == "text")
        if text is not None and not isinstance(text, str):
            raise TypeError
        tokens = completion.usage.completion_tokens if completion.usage else 0
        return Answer(text or "", int(tokens or 0), choice.finish_reason != "length")
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError):
        raise Later("an answer that is no chat completion") from None
