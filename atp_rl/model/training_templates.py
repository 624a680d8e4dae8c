"""Our chat templates in place of known stock ones: a longer conversation begins with the tokens of the shorter one.

`ChatFormat` splices the tokens of replies in and needs none of them. TRL renders conversations itself when it aligns;
with a stock template it would align the model on earlier turns that read otherwise than those it plays and evolves on.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent / "templates"


class TrainingTemplate(NamedTuple):
    file: str
    sha256: str
    """Of the file."""
    replaces: str
    """SHA-256 of the stock template's text (UTF-8)."""


TEMPLATES = (
    TrainingTemplate(
        "qwen3.jinja",
        "1d774ba2af49195d91e323bc4b38a163709571593afd2180d132736136cdd595",
        # trl 1.16.0's chat_templates/qwen3.jinja; published as that of Qwen/Qwen3-8B at b968826d9c46
        "a55ee1b1660128b7098723e0abcd92caa0788061051c62d51cbe87d9cf1974d8",
    ),
    TrainingTemplate(
        "llama3.1.jinja",
        "a8c5401e58a1115c01d01a0e96b098348683d831ceae7abec80685da430a9b89",
        # trl 1.16.0's chat_templates/llama3_1.jinja; published as that of meta-llama/Llama-3.1-8B-Instruct
        "e10ca381b1ccc5cf9db52e371f3b6651576caee0a630b452e2816b2d404d4b65",
    ),
)


def training_template(stock: str) -> str | None:
    """The template that takes the place of `stock`; None for one that is not known.

    Raises:
        RuntimeError: our file is not the one that this code was tested with.
    """
    found = hashlib.sha256(stock.encode()).hexdigest()
    ours = next((template for template in TEMPLATES if template.replaces == found), None)
    if ours is None:
        return None
    text = (FOLDER / ours.file).read_bytes()
    if hashlib.sha256(text).hexdigest() != ours.sha256:
        raise RuntimeError(f"{FOLDER / ours.file} has been changed; install atp_rl anew")
    return text.decode()
