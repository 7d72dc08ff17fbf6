"""Errors that a user of the command line can correct."""

import os

import torch

USER_ERRORS = (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError)  # shown as one sentence
UNFINISHED = os.EX_TEMPFAIL  # exit status 75: the same command resumes


def sentence(error: BaseException, where: str = "") -> str:
    """Return an error message in one line."""
    return f"urank: {where}{' '.join(str(error).split())}"
