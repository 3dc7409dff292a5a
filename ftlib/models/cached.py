"""A reference that computes each group once.

Values are kept per scored token, under a hash of the group: its ids, positions and lengths, and which tokens
are scored. They are dropped when the weights that made them change.

Shapes: T tokens, N scored rows, C continuations.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from ftlib.batches import PackedBatch, Span
from ftlib.errors import CapabilityError, ConfigError
from ftlib.models.fingerprints import hash_settings
from ftlib.models.logprob_files import LogprobFiles, pack, unpack
from ftlib.models.reference_protocol import KeptReference

__all__ = ["Cached"]

logger = logging.getLogger(__name__)
_ENTRY_BYTES = 1024  # of a group in memory beside its values
_INNER = "reference."


@final
class Cached:
    """Remembers the log-probabilities of another reference, in memory and, if given, in a folder.

    A batch whose groups are all known costs no forward; of another one, only the unknown groups are
    computed. The numbers are those of the forward that computed the group first: in a batch of other
    groups, the last bits may differ.

    Args:
        reference: what computes. One that cannot say what it computes with is refused.
        folder: shared by runs and processes; None keeps values in memory only. Files that are damaged,
            or of another reference, are as if they were not there.
        context: what the values depend on beside the reference's weights, configuration, path and
            temperature, in any words, e.g. a hash of the tokenizer and its template. Only the folder asks.
        max_bytes: of the memory, and of the files in the folder; the least recently used go first.

    Raises:
        CapabilityError: the reference does not tell when its weights change.
        ConfigError: no room.
    """

    def __init__(
        self,
        reference: KeptReference,
        folder: str | Path | None = None,
        *,
        context: str = "",
        max_bytes: int = 2**30,
    ) -> None:
        if not isinstance(reference, KeptReference):
            raise CapabilityError(
                f"Cached: expected a reference with mark() and fingerprint(), got "
                f"{type(reference).__name__}, whose values could outlive its weights. Wrap one that "
                "ftlib.models.make_reference makes."
            )
        if max_bytes < 1:
            raise ConfigError(f"Cached: expected max_bytes >= 1, got {max_bytes}.")
        self.reference = reference
        self.folder = folder
        self.context = context
        self.max_bytes = max_bytes
        self._known: OrderedDict[bytes, Tensor] = OrderedDict()  # on the CPU, the most recently used last
        self._bytes = 0
        self._mark: Hashable = None
        self._fingerprint: str | None = None  # of the weights at `_mark`
        self._files: LogprobFiles | None = None

    def logprobs(self, batch: PackedBatch) -> Tensor:
        """See `Reference`."""
        self._renew()
        groups = _groups(batch)
        unknown = [number for number, (digest, _) in enumerate(groups) if digest not in self._known]
        if len(unknown) == len(
            groups
        ):  # as it is, so that the first values are those of the policy's forward
            logprobs_N = self.reference.logprobs(batch)
            self._remember(groups, logprobs_N)
            return logprobs_N
        found = {digest: self._known[digest] for digest, _ in groups if digest in self._known}
        if unknown:
            missing = [groups[number] for number in unknown]
            part = _subset(batch, unknown, [rows for _, rows in missing])
            values = self.reference.logprobs(part).cpu().split([len(rows) for _, rows in missing])
            found |= {digest: value for (digest, _), value in zip(missing, values, strict=True)}
        logprobs_N = torch.empty(len(batch.rows_N))
        for digest, rows in groups:
            logprobs_N[rows] = found[digest]
        self._remember(groups, logprobs_N)
        return logprobs_N.to(batch.ids_T.device)

    def mark(self) -> Hashable:
        """See `KeptReference`."""
        return self.reference.mark()

    def fingerprint(self) -> str:
        """See `KeptReference`. Reads all weights once for as long as they stay."""
        self._renew()
        return self._key()

    def state_dict(self) -> dict[str, Any]:
        """The values, in order of their use, and the state of the reference that computes."""
        inner = {f"{_INNER}{name}": value for name, value in self.reference.state_dict().items()}
        return {**inner, **pack(self._known), "fingerprint": self.fingerprint()}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Take over the reference's state, and the values if it still computes the same."""
        inner = {name: value for name, value in state.items() if name.startswith(_INNER)}
        self.reference.load_state_dict({name.removeprefix(_INNER): value for name, value in inner.items()})
        self._forget()
        if state.get("fingerprint") != self._key():
            logger.warning(
                "the reference is not that of the checkpoint: its cached values are computed again"
            )
            return
        for digest, value in unpack(state).items():
            self._store(digest, value)

    def _key(self) -> str:
        if self._fingerprint is None:
            self._fingerprint = hash_settings({"of": self.reference.fingerprint(), "context": self.context})
        return self._fingerprint

    def _renew(self) -> None:
        """Drop what other weights computed, and look into the folder for what these did."""
        if self._mark is not None and self._mark == self.reference.mark():
            return
        self._forget()
        if self._files is not None:
            for digest, value in self._files.load().items():
                self._store(digest, value)

    def _forget(self) -> None:
        self._known.clear()
        self._bytes, self._fingerprint = 0, None
        self._mark = self.reference.mark()
        if self.folder is not None:
            self._files = LogprobFiles(self.folder, self._key(), max_bytes=self.max_bytes)

    def _remember(self, groups: Sequence[tuple[bytes, Tensor]], logprobs_N: Tensor) -> None:
        values = logprobs_N.cpu()
        new = {digest: values[rows] for digest, rows in groups if digest not in self._known}
        if new and self._files is not None:
            self._files.add(new)
        for digest, _ in groups:
            if digest in self._known:
                self._known.move_to_end(digest)
        for digest, value in new.items():
            self._store(digest, value)

    def _store(self, digest: bytes, value: Tensor) -> None:
        """As the most recently used; the least recently used make room."""
        self._known[digest] = value
        self._bytes += _ENTRY_BYTES + value.nbytes
        while self._bytes > self.max_bytes:
            _, oldest = self._known.popitem(last=False)
            self._bytes -= _ENTRY_BYTES + oldest.nbytes


def _groups(batch: PackedBatch) -> list[tuple[bytes, Tensor]]:
    """Of each group, the hash of what its log-probabilities depend on, and its own among the N rows."""
    kind = batch.ids_T.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    ids, positions, rows, targets, owner = (
        tensor.cpu()
        for tensor in (batch.ids_T, batch.positions_T, batch.rows_N, batch.targets_N, batch.owner_N)
    )
    counts = torch.tensor([len(span.continuations) for span in batch.spans])
    group_N = torch.repeat_interleave(counts)[owner]
    order = torch.argsort(group_N, stable=True)
    scored = order.split(torch.bincount(group_N, minlength=len(batch.spans)).tolist())
    groups = []
    for span, own, first in zip(batch.spans, scored, _firsts(batch.spans), strict=True):
        part = slice(span.start, span.stop)
        digest = hashlib.sha256(f"{kind} {autocast} {span.prefix} {span.continuations} {len(own)}".encode())
        for tensor in (ids[part], positions[part], rows[own] - span.start, targets[own], owner[own] - first):
            digest.update(tensor.contiguous().numpy().data)
        groups.append((digest.digest(), own))
    return groups


def _firsts(spans: Sequence[Span]) -> list[int]:
    """Of each group, its first continuation's number."""
    return [0, *accumulate(len(span.continuations) for span in spans)][: len(spans)]


def _subset(batch: PackedBatch, groups: Sequence[int], scored: Sequence[Tensor]) -> PackedBatch:
    """Some groups of a batch as a batch of their own, its scored rows in their order, without extras.

    Args:
        batch: what they are taken from.
        groups: their numbers.
        scored: of each, which of the N rows are its own, int64 on the CPU.
    """
    spans: list[Span] = []
    rows, owners = [], []
    start = owner = 0
    firsts = _firsts(batch.spans)
    for number, own in zip(groups, scored, strict=True):
        span = batch.spans[number]
        own = own.to(batch.rows_N.device)
        spans.append(replace(span, start=start))
        rows.append(batch.rows_N[own] - span.start + start)
        owners.append(batch.owner_N[own] - firsts[number] + owner)
        start, owner = spans[-1].stop, owner + len(span.continuations)
    taken = [batch.spans[number] for number in groups]
    kept_N = torch.cat(list(scored)).to(batch.rows_N.device)
    return PackedBatch(
        ids_T=torch.cat([batch.ids_T[span.start : span.stop] for span in taken]),
        positions_T=torch.cat([batch.positions_T[span.start : span.stop] for span in taken]),
        spans=tuple(spans),
        rows_N=torch.cat(rows),
        targets_N=batch.targets_N[kept_N],
        weights_N=batch.weights_N[kept_N],
        owner_N=torch.cat(owners),
    )
