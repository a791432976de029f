"""Several processes end as one: an error of any of them ends all, promptly, and is told once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from paradiffusion.errors import UserError
from paradiffusion.training.watch import FAILED, Watch


@contextmanager
def together(watch: Watch) -> Iterator[None]:
    """Around all of a run's work; ``watch`` is closed after it.

    Raises:
        UserError: in the process that failed first, or in the first to notice that another has died.
        SystemExit: in the others, without a word of their own.
    """
    try:
        yield
    except UserError:
        leave_unless_first(watch)
        raise
    except torch.OutOfMemoryError as error:
        leave_unless_first(watch)
        raise out_of_memory(error) from None
    except RuntimeError as error:
        if not is_broken_connection(error):
            watch.fail()
            raise
        lost = watch.who_is_lost()
        if lost is None and not watch.others_failed():
            watch.fail()
            raise
        leave_unless_first(watch)
        raise UserError(
            f"{lost}; the others cannot go on without it. The last checkpoint is whole: look at that process's log, then "
            "run the same command again."
        ) from None
    except SystemExit:  # all of them leave, and have agreed on it
        raise
    except BaseException:
        watch.fail()
        raise
    finally:
        watch.close()


def leave_unless_first(watch: Watch) -> None:
    """The first process that fails tells why; what the others would say is the same, or a consequence."""
    if not watch.fail():
        raise SystemExit(FAILED) from None


def is_broken_connection(error: RuntimeError) -> bool:
    """Whether a collective operation failed, which it does where another process has died."""
    return isinstance(error, torch.distributed.DistError) or any(
        word in str(error) for word in ("gloo", "NCCL", "Connection")
    )


def out_of_memory(error: BaseException) -> UserError:
    """What to do about a GPU that is too small."""
    return UserError(
        f"a batch does not fit into this GPU's memory ({str(error).splitlines()[0]}); lower micro_batch_size= first, then set "
        "gradient_checkpointing=true, ema_device=cpu, or launch with configs/launch/zero2.yaml or zero2_offload.yaml (and for a "
        "run that has not begun, text_encoder.quantization=4bit); scripts/describe.py says what each saves."
    )
