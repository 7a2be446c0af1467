"""Two traces side by side as one web page: the same traffic under two policies or pool sizes."""

from collections import Counter
from pathlib import Path

from .replay import Replay, encode, unspan

TEMPLATE = Path(__file__).with_name("compare.html")

# the numbers of a frame, in its order; those that count blocks are of squares, as in a trace
NAMES = (
    "seconds since the start", "running", "waiting", "blocks in use", "blocks cached",
    "blocks blank", "tokens written so far", "tokens computed so far",
    "blocks found by hash so far", "blocks copied so far", "preemptions so far",
    "blocks evicted so far", "samples done so far",
)  # fmt: skip


class Film(Replay):
    """A Replay that keeps a frame of each step, and one of the end: its numbers, and the blocks
    that look otherwise than in the frame before, as [block, look, block, look, ...]. A look is 0
    for blank, 1 for cached, 2 + request for a block in use, -2 - request for a shared one."""

    def __init__(self):
        super().__init__()
        self.frames: list[list] = []
        self.prompts: Counter[tuple] = Counter()  # of all samples that arrived, to compare traffic
        self.totals: Counter[str] = Counter()
        self._holders: dict[int, int] = {}  # the request that took a block last
        self._looks: dict[int, int] = {}
        self._touched: set[int] = set()

    def _before(self, event: dict) -> None:
        """Note which blocks an event gives back, and the prompts that are new."""
        name = event["e"]
        if name == "arrive" and event["seq"] not in self.seqs:
            self.prompts[tuple(event["tokens"][: event["prompt"]])] += 1
        elif name == "free":
            self._touched.update(self._life(event["seq"]).table)
        elif name == "reset":
            self._touched.update(self.ref_count, self.cached)

    def _after(self, event: dict) -> None:
        """Note what an event that was followed has changed, and make the frame of a step."""
        name, totals = event["e"], self.totals
        totals[name] += 1
        match event:
            case {"e": "pool"}:
                self._touched.update(self.cached)
            case {"e": "hit" | "allocate", "blocks": blocks} | {"e": "resume", "table": blocks}:
                self._take(event["seq"], blocks)
                if name == "hit":
                    totals["found"] += sum(map(bool, blocks))
            case {"e": "copy", "source": source, "target": target}:
                self._take(event["seq"], [target])
                self._touched.add(source)
            case {"e": "fork", "seq": number}:
                self._touched.update(self.seqs[number].table)
            case {"e": "window" | "reject", "blocks": blocks}:
                self._touched.update(blocks)
            case {"e": "evict" | "publish", "block": block}:
                self._touched.add(block)
            case {"e": "tokens", "tokens": tokens}:
                totals["written"] += len(tokens)
            case {"e": "begin", "decodes": decodes, "prefills": chunks}:
                totals["computed"] += sum(stop - start for _, start, stop in chunks)
                totals["computed"] += sum(1 for _ in unspan(decodes))
                self.note()

    def _take(self, number: int, blocks: list[int]) -> None:
        self._holders |= dict.fromkeys(blocks, self.seqs[number].request)
        self._touched.update(blocks)

    def note(self) -> None:
        """Add a frame."""
        changed = []
        for block in sorted(self._touched - {0}):
            look = int(block in self.cached)
            if count := self.ref_count[block]:
                look = (2 + self._holders.get(block, 0)) * (1 if count == 1 else -1)
            if self._looks.get(block, 0) != look:
                self._looks[block] = look
                changed += [block, look]
        self._touched.clear()
        used, cached, total = self.num_used, len(self.cached), self.totals
        numbers = [
            round(self.time, 3), self.states["running"],
            self.states["waiting"] + self.states["preempted"], used, cached,
            self.num_blocks - 1 - used - cached, total["written"], total["computed"],
            total["found"], total["copy"], total["preempt"], total["evict"],
            total["finish"] + total["abort"],
        ]  # fmt: skip
        self.frames.append([numbers, changed])


def write_comparison(traces: list[list[dict]], names: list[str], path: str | Path) -> None:
    """One HTML file with the events of two traces, called by these names, on one slider. It needs
    nothing else. Raises ValueError, as Replay does, for an event that cannot be followed."""
    runs, prompts = [], []
    for name, events in zip(names, traces, strict=True):
        film = Film()
        for number, event in enumerate(events, 1):
            film.follow(event, name, number)
        film.note()
        prompts.append(film.prompts)
        runs.append(
            {
                "name": name, "blocks": film.num_blocks, "size": film.block_size,
                "groups": film.groups, "model": events[0].get("model", ""), "frames": film.frames,
            }
        )  # fmt: skip
    data = encode({"names": NAMES, "same": prompts[0] == prompts[1], "runs": runs})
    page = TEMPLATE.read_text(encoding="utf-8")
    # a `<` would let a name end the script element that holds it
    page = page.replace("/*runs*/", data.replace("<", "\\u003c"))
    Path(path).write_text(page, encoding="utf-8")
