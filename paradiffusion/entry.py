"""Runs a program's ``main``: one sentence instead of a traceback for a user's mistake, exit statuses, ``--help``."""

from __future__ import annotations

import errno
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import NoReturn

from paradiffusion.errors import UserError
from paradiffusion.repository import as_typed

SECONDS_TO_BE_ENDED = 30.0
# The extras of pyproject.toml by the modules that commands import; of two that bring one, that of the command that asks for it first.
EXTRA_OF = {
    **dict.fromkeys(("matplotlib", "open_clip", "sentence_transformers", "torch_fidelity", "torchmetrics", "torchvision"), "evaluation"),
    **dict.fromkeys(("ftfy", "imagehash", "openai", "pyarrow", "sklearn", "tenacity"), "curation"),
    **dict.fromkeys(("gradio", "starlette", "uvicorn"), "apps"),
    "deepspeed": "deepspeed",
    "ray": "ray",
    "vllm": "vllm",
}  # fmt: skip


def run(function: Callable[[list[str]], int], help_text: Callable[[], str] = str) -> NoReturn:
    """Call ``function(arguments)`` and exit with its status; 2 for a UserError, 128 + its number for a signal."""
    arguments = sys.argv[1:]
    if any(argument in ("-h", "--help") for argument in arguments):
        try:
            print(as_typed(help_text()), flush=True)
        except BrokenPipeError:  # `--help | head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    # Libraries' own notices drown what a person should read; errors still come through.
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    # DeepSpeed, which other libraries import, has no variable for it, and sets the level of its logger itself.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Batches of many shapes would leave a GPU's memory in pieces; torch reads it when it is imported.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    try:
        status = function(arguments)
    except UserError as error:
        if not error.told:
            let_the_first_say_it()
            print(f"error: {as_typed(str(error))}", file=sys.stderr, flush=True)
        status = 2
    except BrokenPipeError:
        try:
            print(flush=True)  # What failed is lost; only another write tells whether the pipe was this one.
        except BrokenPipeError:  # `... | head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)  # As a shell tells a SIGPIPE: the work was cut off.
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS):
            raise
        print(
            f"error: {error.filename or 'a file'} could not be written ({error.strerror}); make room or choose another "
            "folder, then run the same command again.",
            file=sys.stderr,
        )
        status = 2
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module in ("", "paradiffusion"):
            raise
        extra = EXTRA_OF.get(module)
        whose, brackets = (f" and belongs to the extra {extra}", f"[{extra}]") if extra else ("", "")
        print(
            f"error: the package of the module {module} is not installed{whose}: `pip install 'paradiffusion{brackets}'` (in a "
            f"checkout `pip install '.{brackets}'` or `make setup`).",
            file=sys.stderr,
        )
        status = 2
    except KeyboardInterrupt as interrupt:
        print("interrupted.", file=sys.stderr)
        status = getattr(interrupt, "status", 130)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(status)


def let_the_first_say_it() -> None:
    """Before processes are joined they all find the same mistake: the first of a machine says it, and its end makes the
    launcher end the others meanwhile. Whoever is still there after a while has found something of its own."""
    torch = sys.modules.get("torch")
    joined = torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
    if os.environ.get("LOCAL_RANK", "0") != "0" and not joined:
        time.sleep(SECONDS_TO_BE_ENDED)
