"""What every command line shares: one sentence instead of a traceback for a user's mistake, and help."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

from paradiffusion.errors import UserError


def run(function: Callable[[list[str]], int], help_text: Callable[[], str] = str) -> NoReturn:
    """Call ``function(arguments)`` and exit with its status; 2 for a UserError, 130 for an interrupt before work began."""
    arguments = sys.argv[1:]
    if any(argument in ("-h", "--help") for argument in arguments):
        print(help_text())
        sys.exit(0)
    # Libraries' own notices drown what a person should read; errors still come through.
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        status = function(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        status = 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        print(
            f"error: {error.filename or 'a file'} could not be written ({error.strerror}); make room or choose another "
            "folder, then run the same command again.",
            file=sys.stderr,
        )
        status = 2
    except KeyboardInterrupt:
        print("interrupted.", file=sys.stderr)
        status = 130
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(status)
