"""The version of the weights, and the version that drew each token.

Asynchronous reinforcement learning changes the weights while samples are being written:

    weights        version 0            | version 1      | version 2
    sample         The island was small | and a little   | boat lay
    versions       0   0      0   0     | 1   1 1        | 2    2

Nothing is recorded in a step. When the weights change, the lengths of all unfinished samples are
recorded. The tokens of a sample after its last recorded length were drawn by the present version.
"""

from typing import NamedTuple
from weakref import WeakKeyDictionary

from ..engine import Request
from ..runner import Extension
from ..scheduler import Sequence
from . import check_number


class Start(NamedTuple):
    """The position of a sequence from which a version drew the tokens."""

    position: int
    version: int


class State(NamedTuple):
    """The present version, and the starts of the sequences that existed at the last change."""

    version: int
    starts: WeakKeyDictionary[Sequence, tuple[Start, ...]]


class PolicyVersions(Extension):
    """Numbers the weights of an engine. Weights with the same version are equal, unless a caller
    gives the number to other weights. Accepts the keyword max_version_lag: a sample ends when the
    weights are more than this number of versions ahead of those that drew its first token
    (finish_reason "abort", stop_reason "max_version_lag"); 0: one version draws all its tokens.
    """

    options = ("max_version_lag",)

    def __init__(self):
        # one assignment replaces the state, so an exception cannot leave half of a change
        self.state = State(0, WeakKeyDictionary())

    @property
    def version(self) -> int:
        """The version of the weights of the last step, or of new weights set after it."""
        return self.state.version

    def check(self, version: int | None) -> int | None:
        """Check the version of new weights; None stands for the next number. Raises TypeError or
        ValueError for a number below the present version."""
        if version is None:
            return None
        version = check_number("version", version)
        if version < self.version:
            raise ValueError(
                f"version={version}: the engine has version {self.version} already, and versions "
                "must not decrease; omit `version` to count by one"
            )
        return version

    def on_request(self, request: Request) -> None:
        lag = request.options.get("max_version_lag")
        if lag is not None:
            request.options["max_version_lag"] = check_number("max_version_lag", lag)

    def on_weights(self, version: int | None) -> None:
        if version is None:
            version = self.version + 1
        starts: WeakKeyDictionary[Sequence, tuple[Start, ...]] = WeakKeyDictionary()
        for request in self.engine.requests.values():
            for seq in request.sequences:
                starts[seq] = (*self.starts_of(seq), Start(len(seq.token_ids), version))
        self.state = State(version, starts)

    def starts_of(self, seq: Sequence) -> tuple[Start, ...]:
        """The starts of a sequence. Without a record, the present version draws all its tokens."""
        return self.state.starts.get(seq) or (Start(seq.num_prompt, self.version),)

    def versions_of(self, seq: Sequence) -> list[int]:
        """The version of each output token. A forced token has that of the draw before it."""
        starts = self.starts_of(seq)
        stops = [start.position for start in starts[1:]] + [len(seq.token_ids)]
        versions: list[int] = []
        for start, stop in zip(starts, stops, strict=True):
            # a text that was cut is shorter than its recorded length
            num_tokens = min(stop, len(seq.token_ids)) - start.position
            versions += [start.version] * num_tokens
        return versions

    def on_reset(self) -> None:
        """After new weights, and after an error: end the samples that are too far behind."""
        for request in self.engine.requests.values():
            lag = request.options.get("max_version_lag")
            if lag is None:
                continue
            for seq in request.sequences:
                is_unfinished = seq.finish_reason is None and seq.output
                if is_unfinished and self.version - self.versions_of(seq)[0] > lag:
                    self.engine.scheduler.finish(seq, "abort", "max_version_lag")

    def on_sample_output(self, request: Request, seq: Sequence, output: dict) -> None:
        versions = self.versions_of(seq)
        # for a sample without tokens, the version that would draw the first one
        output["version"] = versions[-1] if versions else self.version
        output["versions"] = versions
