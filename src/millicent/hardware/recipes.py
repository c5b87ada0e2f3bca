"""Products that are known to fail or to hang, by card and by torch: to be told, and never to be tried."""

from __future__ import annotations

from millicent.facts.wheels import is_older, parse_version


def known_failure(product: str, capability: tuple[int, int], torch: str, cuda: str | None) -> str | None:
    """Why torch's own product of this kind does not work on this card, None where nothing is known against it.

    product: as facts/formats.py names it. torch: its version; cuda: what it was built with.
    """
    if product != "fp8-rowwise":
        return None
    if hangs_on_ada(capability, torch):
        return (
            f"torch {torch} can hang on this card (8.9) in FP8 products with scales per row (pytorch issue 177651, fixed in 2.12)"
        )
    if capability[0] == 12 and parse_version(torch)[:2] == (2, 10) and (cuda or "").startswith("13."):
        return f"torch {torch} fails on this card in FP8 products with scales per row (pytorch issue 192707)"
    return None


def hangs_on_ada(capability: tuple[int, int], torch: str) -> bool:
    """Its kernel ignores the stream that it is called on. Our own kernel is taken there instead."""
    return capability == (8, 9) and is_older(torch, "2.12")


def doubtful(product: str, cuda: str | None) -> str | None:
    """Why it may fail for some sizes, None where nothing is known against it."""
    if product == "fp8-rowwise" and (cuda or "").startswith("12.9"):
        return "CUDA 12.9 can fail in FP8 products with scales per row and large K (pytorch/ao issue 4582)"
    return None
