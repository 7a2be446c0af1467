"""Two traces on one web page, to compare two policies or pool sizes with the same traffic."""

from collections import Counter
from pathlib import Path

from .replay import Replay, encode, unspan

TEMPLATE = Path(__file__).with_name("compare.html")

# names of the numbers in a frame. numbers of blocks count squares, the parts of groups of layers
NAMES = (
    "seconds since the start", "running", "waiting", "blocks in use", "blocks cached",
    "blocks blank", "tokens generated so far", "tokens computed so far",
    "blocks found by hash so far", "blocks copied so far", "preemptions so far",
    "blocks evicted so far", "samples finished so far",
)  # fmt: skip


class Film(Replay):
    """A Replay that makes a frame for each step, and one for the end. A frame has its numbers, and
    the blocks whose look has changed since the frame before, as [block, look, block, look, ...].
    A look is 0 for blank, 1 for cached, 2 + request for in use, -2 - request for shared."""

    def __init__(self):
        super().__init__()
        self.frames: list[list] = []
        self.prompts: Counter[tuple] = Counter()  # prompts of all samples, to compare traffic
        self.totals: Counter[str] = Counter()
        self.takers: dict[int, int] = {}  # block -> the request that took it last
        self.looks: dict[int, int] = {}
        self.touched: set[int] = set()

    def before(self, event: dict) -> None:
        """Note the blocks that an event gives back, and new prompts."""
        name = event["e"]
        if name == "arrive" and event["seq"] not in self.seqs:
            self.prompts[tuple(event["tokens"][: event["prompt"]])] += 1
        elif name == "free":
            self.touched.update(self.life(event["seq"]).table)
        elif name == "reset":
            self.touched.update(self.ref_count, self.cached)

    def after(self, event: dict) -> None:
        """Note the changes of an event, and make the frame of a step."""
        name = event["e"]
        totals = self.totals
        totals[name] += 1
        match event:
            case {"e": "pool"}:
                self.touched.update(self.cached)
            case {"e": "hit" | "allocate", "blocks": blocks} | {"e": "resume", "table": blocks}:
                self.take(event["seq"], blocks)
                if name == "hit":
                    totals["found"] += sum(map(bool, blocks))
            case {"e": "copy", "source": source, "target": target}:
                self.take(event["seq"], [target])
                self.touched.add(source)
            case {"e": "fork", "seq": number}:
                self.touched.update(self.seqs[number].table)
            case {"e": "window" | "reject", "blocks": blocks}:
                self.touched.update(blocks)
            case {"e": "evict" | "publish", "block": block}:
                self.touched.add(block)
            case {"e": "tokens", "tokens": tokens}:
                totals["written"] += len(tokens)
            case {"e": "begin", "decodes": decodes, "prefills": chunks}:
                totals["computed"] += sum(stop - start for _, start, stop in chunks)
                totals["computed"] += sum(1 for _ in unspan(decodes))
                self.add_frame()

    def take(self, number: int, blocks: list[int]) -> None:
        """Note that a sequence has received blocks."""
        self.takers |= dict.fromkeys(blocks, self.seqs[number].request)
        self.touched.update(blocks)

    def add_frame(self) -> None:
        """Add a frame of the current state."""
        changed = []
        for block in sorted(self.touched - {0}):
            look = self.look(block)
            if self.looks.get(block, 0) != look:
                self.looks[block] = look
                changed += [block, look]
        self.touched.clear()
        totals = self.totals
        num_cached = len(self.cached)
        numbers = [
            round(self.time, 3),
            self.states["running"],
            self.states["waiting"] + self.states["preempted"],
            self.num_used,
            num_cached,
            self.num_blocks - 1 - self.num_used - num_cached,
            totals["written"],
            totals["computed"],
            totals["found"],
            totals["copy"],
            totals["preempt"],
            totals["evict"],
            totals["finish"] + totals["abort"],
        ]
        self.frames.append([numbers, changed])

    def look(self, block: int) -> int:
        """The look of a block, as a number."""
        num_tables = self.ref_count[block]
        if num_tables == 0:
            return int(block in self.cached)
        look = 2 + self.takers.get(block, 0)
        return look if num_tables == 1 else -look


def write_comparison(traces: list[list[dict]], names: list[str], path: str | Path) -> None:
    """Write one self-contained HTML file that compares two traces; names: their titles. Raises
    ValueError, as Replay does, for an impossible event."""
    runs = []
    prompts = []
    for name, events in zip(names, traces, strict=True):
        film = Film()
        for number, event in enumerate(events, 1):
            film.follow(event, name, number)
        film.add_frame()
        prompts.append(film.prompts)
        run = {
            "name": name,
            "blocks": film.num_blocks,
            "size": film.block_size,
            "groups": film.num_groups,
            "model": events[0].get("model", ""),
            "frames": film.frames,
        }
        runs.append(run)
    data = encode({"names": NAMES, "same": prompts[0] == prompts[1], "runs": runs})
    page = TEMPLATE.read_text(encoding="utf-8")
    # a `<` would let a name end the script element that holds it
    page = page.replace("/*runs*/", data.replace("<", "\\u003c"))
    Path(path).write_text(page, encoding="utf-8")
