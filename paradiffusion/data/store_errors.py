"""What the errors of the stores' libraries mean: in a few words, and whether to try again can help.

Each library has errors of its own, and wraps the ones below it. They are told by what they carry (a status, a code, a
cause) and by their names, so that no library has to be there.
"""

from __future__ import annotations

import ssl
from typing import Any, Final

from paradiffusion.errors import UserError

# Answers of a server that say "not now": too slow, too early, too many requests. Other 4xx stay as they are.
_PASSING: Final = (408, 425, 429)
# S3 says the same in words, some of them under status 400.
_PASSING_CODES: Final = ("RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded")
_NO_CREDENTIALS: Final = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"}
# All other errors that botocore itself raises are slips in the settings: a profile or a region that is not there, say.
_BOTO_PASSING: Final = {
    "HTTPClientError", "ConnectionError", "IncompleteReadError", "ResponseParserError", "CredentialRetrievalError",
    "MetadataRetrievalError",
}  # fmt: skip


class ShortRead(OSError):
    """Fewer bytes came than were asked for."""


class NoRanges(OSError):
    """The server sends whole files where pieces are asked for."""


class Replaced(OSError):
    """The file is not the one any more that was asked for."""


class RemoteError(OSError):
    """A remote file could not be read, for good or after all retries; the message says why in a few words."""


def explain(error: BaseException) -> tuple[bool, str]:
    """Whether an error may pass, and what it says in a few words, the same words for the same cause."""
    cause = error.__cause__
    if (
        isinstance(error, FileNotFoundError)
        and cause is not None
        and not isinstance(cause, FileNotFoundError | KeyError)
    ):
        return explain(cause)  # fsspec's info() calls a broken connection a file that was not found.
    chain = _chain(error)
    if isinstance(error, ShortRead):
        return True, str(error)
    if isinstance(error, NoRanges | Replaced):
        return False, str(error)
    if any(isinstance(one, ssl.SSLCertVerificationError) for one in chain):
        return False, "the server's certificate is not trusted"
    names = {kind.__name__ for one in chain for kind in type(one).__mro__}
    if names & _NO_CREDENTIALS:
        return False, "no credentials are found in the environment (a public bucket of S3 needs FSSPEC_S3_ANON=true)"
    if "OfflineModeIsEnabled" in names:
        return False, "HF_HUB_OFFLINE is set, which forbids it"
    return _explain_answer(error, chain) or _explain_kind(error, names)


def _explain_answer(error: BaseException, chain: list[BaseException]) -> tuple[bool, str] | None:
    """As ``explain``, by what the server answered; None where it did not."""
    # An outer error may have no status, or hide it: fsspec's info() calls a 503 a file that was not found.
    status = next((found for one in chain if (found := _status(one)) is not None), None)
    code = next((word for one in chain if (word := _code(one))), "")
    said = f" ({code})" if code else ""
    if code == "NoSuchBucket":
        return False, "there is no such bucket"
    if status == 404 or (status is None and isinstance(error, FileNotFoundError)):
        return False, "it is not there"
    # gcsfs tells a 403 by this word alone.
    forbidden = isinstance(error, PermissionError) or str(error).startswith("Forbidden")
    if forbidden or status in (401, 403):
        return False, f"access is denied{said}: check the credentials in the environment"
    if status == 412:
        return False, "it was replaced since it was indexed: index it again (or its mirrors disagree on ETags)"
    if status == 416:
        return False, "it is empty, or shorter than when it was indexed: index it again"
    if status is None:
        return None
    if status in _PASSING or code in _PASSING_CODES or status >= 500:
        return True, f"the server answers {status}{said}"
    # S3 answers 400 to a HEAD with expired credentials, and 301 in the name of another region.
    advice = ": check address, region and credentials" if code or status < 400 or _is_boto(chain[-1]) else ""
    return False, f"the server answers {status}{said}{advice}"


def _explain_kind(error: BaseException, names: set[str]) -> tuple[bool, str]:
    """As ``explain``, where no server answered."""
    if isinstance(error, TypeError | ValueError | AttributeError | ImportError | NotImplementedError | UserError):
        return False, f"{type(error).__name__} {error}"
    if _is_boto(error) and not names & _BOTO_PASSING:
        return False, f"{type(error).__name__} {error}"
    return True, f"the connection fails ({type(error).__name__})"


def _chain(error: BaseException) -> list[BaseException]:
    """An error and what caused it, outermost first."""
    chain, found = [error], error.__cause__
    while found is not None and found not in chain:
        chain.append(found)
        found = found.__cause__
    return chain


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error carries: its own, or its response's."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore's
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return found if isinstance(found, int) else None
    if any(kind.__name__ == "HttpProcessingError" for kind in type(error).__mro__):
        return None  # aiohttp's, when an answer is cut: it carries a 400 that no server sent.
    for holder in (error, response):
        for name in ("status", "status_code", "code"):
            found = getattr(holder, name, None)
            if isinstance(found, str) and found.isdigit():
                found = int(found)
            if isinstance(found, int) and found >= 100:  # aiohttp's is 0 where no answer came
                return found
    return None


def _code(error: BaseException) -> str:
    """S3's word for what is wrong, "" where there is none: to a HEAD it can only answer a number."""
    response = getattr(error, "response", None)
    found = response.get("Error", {}).get("Code", "") if isinstance(response, dict) else ""
    return "" if str(found).isdigit() else str(found)


def _is_boto(error: BaseException) -> bool:
    return type(error).__module__.split(".")[0] in ("botocore", "aiobotocore")
