"""Today's rental prices, fetched by gpuhunt (the extra `prices`) into a dated file in the user's folder. The only home of gpuhunt.

A file is written once and never again; `facts.prices.read_prices` merges them with the package's.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import re
import socket
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from millicent.errors import InputError, MachineError, MissingExtraError, OutputError
from millicent.facts.gpus import Gpu, read_gpus
from millicent.facts.prices import RentalKind, RentalPrice

if TYPE_CHECKING:
    from gpuhunt import Catalog, CatalogItem

# as gpuhunt calls them, and as our price files do. The first nine publish catalogs; Vast.ai is asked itself. None wants a key
PROVIDERS = {
    "aws": "AWS",
    "azure": "Azure",
    "cloudrift": "CloudRift",
    "gcp": "Google Cloud",
    "lambdalabs": "Lambda",
    "nebius": "Nebius",
    "oci": "Oracle Cloud",
    "runpod": "RunPod",
    "verda": "Verda",
    "vastai": "Vast.ai",
}
ONLINE = "vastai"

# Vast.ai's offers include a disk, which would otherwise be all that the host has
_DISK_GB = 60
_TIMEOUT_S = 20.0
_MICRO = Decimal("1e-6")


@dataclass(frozen=True, slots=True, kw_only=True)
class Refreshed:
    """What a refresh found. path: the new file. unmapped: offers of cards that are not in our table, or whose name could be that of
    several, by provider and name; they are not in the file. larger: offers of several cards at once, left out too.
    failed: the providers that gave nothing, and why.
    """

    path: Path
    prices: tuple[RentalPrice, ...]
    unmapped: Mapping[str, int]
    larger: int
    failed: Mapping[str, str]


def refresh(folder: Path, now: datetime.datetime, providers: Sequence[str] = tuple(PROVIDERS), *, local: bool = False) -> Refreshed:
    """Fetch the prices of single NVIDIA cards and write them to folder/YYYY-MM-DD.toml, or with the time where that is there.

    local: gpuhunt reads its catalogs from the folder in GPUHUNT_CATALOG_DIR, and nothing is asked of the network.
    Raises MissingExtraError without gpuhunt, InputError for an unknown provider, MachineError where nobody gave a price, and
    OutputError where the file cannot be written.
    """
    if unknown := sorted(set(providers) - PROVIDERS.keys()):
        raise InputError(f"There is no provider named {', '.join(unknown)}.", f"Use {', '.join(PROVIDERS)}.")
    prices: list[RentalPrice] = []
    unmapped: Counter[str] = Counter()
    failed: dict[str, str] = {}
    larger = 0
    catalog = _open_catalog(local)
    for provider in providers:
        try:
            offers = _fetch(catalog, provider, local)
        except _fetch_errors() as error:
            failed[PROVIDERS[provider]] = f"{type(error).__name__}: {error}"
            continue
        single = [offer for offer in offers if offer.gpu_count == 1]
        larger += len(offers) - len(single)
        found, strange = _summarize(single, provider, now.date(), _source(catalog, provider))
        prices += found
        unmapped += strange
    if not prices:
        told = "; ".join(f"{name}: {reason}" for name, reason in failed.items()) or "no offer is of a card that we know"
        raise MachineError(f"No price was found ({told}).", "Check the network, and try again.")
    return Refreshed(path=_write(folder, now, prices), prices=tuple(prices), unmapped=dict(unmapped), larger=larger, failed=failed)


def _open_catalog(local: bool) -> Catalog:
    try:
        from gpuhunt import Catalog, GPUHuntError
    except ImportError as error:
        raise MissingExtraError("Fetching prices needs gpuhunt.", 'Install it with: pip install "millicent[prices]"') from error
    catalog = Catalog(balance_resources=False, auto_reload=False)
    if not local:
        from gpuhunt.providers.vastai import VastAIProvider

        catalog.add_provider(VastAIProvider.from_env())
        try:
            with _time_limit():
                catalog.load()
        except GPUHuntError as error:
            raise MachineError(f"No price catalog could be fetched: {error}.", "Check the network, and try again.") from error
    return catalog


@contextmanager
def _time_limit() -> Iterator[None]:
    """gpuhunt's downloads have no time limit of their own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _fetch(catalog: Catalog, provider: str, local: bool) -> list[CatalogItem]:
    # a catalog that did not come is logged by gpuhunt and then answers with no offers, as if there were none
    if not local and provider != ONLINE and provider not in catalog.catalog:
        raise LookupError("its catalog could not be fetched")
    if local and provider == ONLINE:
        raise LookupError("has no catalog file")
    disk_gb = _DISK_GB if provider == ONLINE else None
    return catalog.query(provider=provider, gpu_vendor="nvidia", min_gpu_count=1, min_disk_size=disk_gb)


def _fetch_errors() -> tuple[type[Exception], ...]:
    from gpuhunt import GPUHuntError

    # no network, no file; and an answer of another form than gpuhunt expects
    return (GPUHuntError, OSError, LookupError, ValueError, TypeError)


def _source(catalog: Catalog, provider: str) -> str:
    loaded = catalog.catalog.get(provider)
    return f"gpuhunt {version('gpuhunt')}, {provider}{f', catalog {loaded.version}' if loaded else ''}"


def _summarize(
    offers: Iterable[CatalogItem], provider: str, day: datetime.date, source: str
) -> tuple[list[RentalPrice], Counter[str]]:
    """The range of prices of each card and kind, and the offers whose card we do not know."""
    gpus = read_gpus()
    asked: dict[tuple[str, RentalKind], list[Decimal]] = defaultdict(list)
    unmapped: Counter[str] = Counter()
    for offer in offers:
        gpu = match_gpu(gpus, offer.gpu_name or "", offer.instance_name, offer.gpu_memory)
        if gpu is None:
            memory = f" {offer.gpu_memory:g} GB" if offer.gpu_memory else ""
            unmapped[f"{PROVIDERS[provider]} {offer.gpu_name}{memory}"] += 1
        elif math.isfinite(offer.price) and offer.price > 0:
            asked[gpu.name, _kind(provider, offer)].append(_usd(offer.price))
    prices = [
        RentalPrice(
            provider=PROVIDERS[provider],
            gpu=gpu,
            kind=kind,
            usd_per_hour=min(usd),
            highest_usd_per_hour=max(usd) if max(usd) > min(usd) else None,
            since=day,
            source=source,
            checked=day,
            note=f"{len(usd)} offer{'s' if len(usd) > 1 else ''}"
            + (f", {_DISK_GB} GB of disk included" if provider == ONLINE else ""),
        )
        for (gpu, kind), usd in sorted(asked.items())
    ]
    return prices, unmapped


def match_gpu(gpus: Iterable[Gpu], name: str, instance: str, memory_gb: float | None) -> Gpu | None:
    """The card that an offer is of, or None where its name is no card's or could be several cards'.

    name: gpuhunt's, without spaces ("RTX4090", "A4000", "H100"). instance: the provider's own, which for RunPod is what the card
    reports. memory_gb: of one card; an offer of a part of a card shows by it.
    """
    gpus = tuple(gpus)
    by_report = [gpu for gpu in gpus if instance in gpu.reported]
    if by_report:
        return by_report[0]
    plain = _squash(name)
    wanted = {plain, f"{plain}{memory_gb:.0f}gb"} if memory_gb else {plain}
    if re.fullmatch(r"a\d000", plain):  # gpuhunt drops the RTX of "RTX A4000"
        wanted.add(f"rtx{plain}")
    found = [gpu for gpu in gpus if wanted & {_squash(each) for each in (gpu.name, *gpu.reported)}]
    found = [gpu for gpu in found if memory_gb is None or abs(memory_gb / (gpu.memory_mib / 1024) - 1) < 0.1]
    return found[0] if len(found) == 1 else None


def _squash(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", re.sub(r"nvidia|geforce|tesla", "", name.lower()))


def _usd(price: float) -> Decimal:
    """The digits that the catalog shows, down to a millionth."""
    usd = Decimal(str(price))
    rounded = usd.quantize(_MICRO)
    return usd if usd == rounded else rounded


def _kind(provider: str, offer: CatalogItem) -> RentalKind:
    if offer.spot:
        return "spot"
    # RunPod's community cloud is listed by country code, its own by data center
    is_community = provider == ONLINE or (provider == "runpod" and len(offer.location) == 2)
    return "community" if is_community else "on-demand"


def _write(folder: Path, now: datetime.datetime, prices: Iterable[RentalPrice]) -> Path:
    """Write the file whole or not at all, and never over another."""
    part = folder / f".{os.getpid()}.partial"
    names = (f"{now:%Y-%m-%d}.toml", f"{now:%Y-%m-%dT%H%M%S}.toml", f"{now:%Y-%m-%dT%H%M%S.%f}.toml")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part.write_text("\n".join(_row(price) for price in prices), encoding="utf-8")
        try:
            for name in names:
                try:
                    # unlike a rename, a link never replaces what is there
                    (folder / name).hardlink_to(part)
                except FileExistsError:
                    continue
                return folder / name
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"The prices cannot be written to {folder}: {error}.", "Choose a folder that can be written to."
        ) from error
    raise OutputError(f"The prices of {now} are in {folder} already.", "Try again.")


def _row(price: RentalPrice) -> str:
    """A [[rental]] table, as in the package's price files."""
    lines = {
        "provider": _text(price.provider),
        "gpu": _text(price.gpu),
        "kind": _text(price.kind),
        "usd_per_hour": _text(f"{price.usd_per_hour:f}"),
        "highest_usd_per_hour": None if price.highest_usd_per_hour is None else _text(f"{price.highest_usd_per_hour:f}"),
        "since": price.since.isoformat(),
        "source": _text(price.source),
        "checked": price.checked.isoformat(),
        "note": _text(price.note),
    }
    return "[[rental]]\n" + "".join(f"{key} = {value}\n" for key, value in lines.items() if value is not None)


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)
