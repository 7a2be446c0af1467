"""Recorder: finds the events of the blocks and sequences of a scheduler.

The core does not report events. A Recorder keeps a record of each sequence, as the events describe
it. It compares records with sequences after a step was planned and after it has ended. It writes
the differences as events, in a possible order from which each state of the pool can be rebuilt,
including the order of the cached blocks:

    tokens, force                       after a step has ended
    publish, free, preempt, finish      sequences that have given back all blocks
    window, reject                      sequences that have given back some blocks
    copy, allocate, publish             sequences that have received blocks
    admit, hit, miss, allocate          sequences that have left the queue
    fork                                samples that begin
    begin                               after a step was planned

Blocks are given back before other sequences take them. The pool's list of cached blocks shows the
order. A block is evicted right before it appears in its next table.

Three facts cannot be recorded, because the finished plan has no trace of them: a copy or blocks for
a sequence that is preempted in the same plan (evictions for it are recorded); the exact time of an
abort between two steps; and the order in which sequences of one plan received their blocks.
"""

from collections.abc import Callable
from itertools import count

from ..blocks import NULL_BLOCK, BlockPool
from ..features.scoring import ScoredSequence
from ..features.windows import GroupedBlockManager
from ..scheduler import Plan, Scheduler, Sequence
from .log import EventLog
from .releases import Kind, Record, Release, find_releases, in_order
from .replay import VERSION, spans

NO_PLAN = Plan()


class Recorder:
    """Writes the events of a scheduler to a log, from now on until `stop`. No step may be in
    flight. decode: returns the text of a token id; facts: more fields of the first event.

    Its user calls arrive after Scheduler.add, begin_step after schedule, end_step after update,
    reset after reset, and catch_up to record changes between two steps.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        log: EventLog,
        decode: Callable[[int], str] | None = None,
        **facts,
    ):
        self.scheduler = scheduler
        self.log = log
        self.decode = decode
        self.spelled: set[int] = set()  # token ids with a written text
        self.running: dict[Sequence, Record] = {}
        self.waiting: dict[Sequence, Record] = {}
        self.sequence_numbers = count()
        pool = scheduler.blocks.pool
        self.hash_of = dict(pool.hash_of)  # hashes of findable blocks
        # evicted block since the last comparison -> the hash it has lost
        self.evicted: dict[int, bytes] = {}
        self.windows = [-1]
        if isinstance(scheduler.blocks, GroupedBlockManager):
            self.windows = list(scheduler.blocks.windows)
        self.num_groups = len(self.windows)
        self.has_windows = max(self.windows) >= 0
        self.write_present(**facts)
        self.policy = pool.eviction
        self.recorded_policy = self.evict  # one object, so that `stop` can compare it
        pool.eviction = self.recorded_policy

    def stop(self) -> None:
        """Restore the eviction policy of the pool."""
        pool = self.scheduler.blocks.pool
        if pool.eviction is self.recorded_policy:
            pool.eviction = self.policy

    def evict(self, pool: BlockPool) -> int:
        """Apply the eviction policy of the pool, and note the chosen block."""
        block = self.policy(pool)
        content_hash = pool.hash_of.get(block)
        if content_hash is not None:
            self.evicted[block] = content_hash
        return block

    def write_present(self, **facts) -> None:
        """Write the first events: the current state of the pool and of all sequences."""
        blocks = self.scheduler.blocks
        self.log.add(
            "pool",
            version=VERSION,
            blocks=blocks.pool.num_blocks,
            block_size=blocks.block_size,
            caching=blocks.enable_prefix_caching,
            max_batch_size=self.scheduler.max_batch_size,
            max_batched_tokens=self.scheduler.max_batched_tokens,
            windows=self.windows,
            hashes={block: content_hash.hex() for block, content_hash in self.hash_of.items()},
            cached=list(blocks.pool.cached),
            **facts,
        )
        for seq in [*self.scheduler.running, *self.scheduler.paused, *self.scheduler.waiting]:
            self.arrive(seq)
            if seq.block_table:
                self.write_table(seq)

    # moments

    def arrive(self, seq: Sequence, before: Record | None = None) -> None:
        """Record that a sequence was queued. before: its record before a reset."""
        number = next(self.sequence_numbers) if before is None else before.number
        self.waiting[seq] = Record(number, len(seq.token_ids))
        self.spell(seq.token_ids)
        self.log.add(
            "arrive",
            seq=number,
            request=seq.request_id,
            sample=seq.index,
            samples=1 + seq.num_forks,
            tokens=list(seq.token_ids),
            prompt=seq.num_prompt,
            limit=seq.max_length,
            score=len(seq.targets) if isinstance(seq, ScoredSequence) else 0,
        )

    def begin_step(self, plan: Plan, step: int) -> None:
        """Record a planned step. step: its number."""
        self.catch_up(plan)
        if not plan.chunks:
            return
        decodes = []
        prefills = []
        for seq, start, stop, _ in plan.chunks:
            record = self.running[seq]
            record.num_computed = stop
            if stop - start == 1 and start >= seq.num_prompt:
                decodes.append(record.number)
            else:
                prefills.append((record.number, start, stop))
        self.log.add("begin", step=step, decodes=spans(decodes), prefills=prefills)

    def end_step(self, plan: Plan, step: int) -> None:
        """Record the end of a step."""
        self.write_tokens(plan, step)
        self.catch_up()

    def reset(self) -> None:
        """Record a reset: the pool is blank, and all unfinished sequences arrive again. The reset
        may follow an exception at any line, so the records are not compared."""
        before = self.running | self.waiting
        self.running = {}
        self.waiting = {}
        self.hash_of = {}
        self.evicted = {}
        self.log.add("reset")
        ended = [seq for seq in self.scheduler.finished if seq in before]
        for seq in [*ended, *self.scheduler.waiting]:
            self.arrive(seq, before.get(seq))
        self.catch_up()

    def catch_up(self, plan: Plan = NO_PLAN) -> None:
        """Write all changes. plan: the plan that was just made."""
        changed = self.find_changed(plan)
        if changed:
            self.write_releases(changed, plan)
        for seq, record in changed:
            if seq.block_table != record.table and seq in self.running:
                self.write_growth(seq, record)
            if seq.num_published > record.num_published:
                self.write_published(seq, record)
                record.num_published = seq.num_published
        if len(self.scheduler.running) > len(self.running) or self.scheduler.paused:
            self.write_new_tables(plan)
        if self.evicted:
            self.write_evictions(list(self.evicted))  # for sequences that were preempted since
        if len(self.scheduler.waiting) != len(self.waiting):
            for seq in [seq for seq in self.waiting if seq.finish_reason is not None]:
                self.write_end(seq, self.waiting.pop(seq))

    def find_changed(self, plan: Plan) -> list[tuple[Sequence, Record]]:
        """The sequences that differ from their records. This runs in each step, so it compares
        whole tables only if entries can differ: after a copy, and with windows."""
        if plan.copies or self.has_windows:
            return [
                (seq, record)
                for seq, record in self.running.items()
                if seq.block_table != record.table
                or seq.num_published != record.num_published
                or seq.num_computed < record.num_computed
            ]
        return [
            (seq, record)
            for seq, record in self.running.items()
            if len(seq.block_table) != len(record.table)
            or seq.num_published != record.num_published
            or seq.num_computed < record.num_computed
        ]

    # tokens

    def write_tokens(self, plan: Plan, step: int) -> None:
        """Write the tokens of a step: first the drawn tokens, then tokens that a tool appended."""
        numbers = []
        drawn = []
        forced: list[tuple[int, list[int]]] = []
        for seq in dict.fromkeys(plan.draws.seqs):
            record = self.running.get(seq) or self.waiting.get(seq)
            if record is None:  # the sequence had ended before
                continue
            start = record.num_tokens
            record.num_tokens = len(seq.token_ids)  # less, if a stop string has cut the text
            if record.num_tokens == start + 1 and not seq.forced:  # most have one new token
                drawn.append(seq.token_ids[-1])
                numbers.append(record.number)
                continue
            new = seq.token_ids[start:]
            if seq.forced:
                mask = seq.mask(start, record.num_tokens)
                num_drawn = mask.index(0) if 0 in mask else len(mask)
                if num_drawn < len(new):
                    forced.append((record.number, new[num_drawn:]))
                    new = new[:num_drawn]
            drawn += new
            numbers += [record.number] * len(new)
        self.spell(drawn)
        self.log.add("tokens", step=step, seqs=spans(numbers), tokens=drawn)
        for number, token_ids in forced:
            self.spell(token_ids)
            self.log.add("force", seq=number, tokens=token_ids)

    def spell(self, token_ids: list[int]) -> None:
        """Write the texts of token ids that occur for the first time."""
        if self.decode is None:
            return
        new = set(token_ids) - self.spelled
        if new:
            ids = {token_id: self.decode(token_id) for token_id in sorted(new)}
            self.log.add("text", ids=ids)
            self.spelled |= new

    # blocks that were given back

    def write_releases(self, changed: list[tuple[Sequence, Record]], plan: Plan) -> None:
        """Write the blocks that tables have lost, in the order in which they were given back."""
        releases = []
        for seq, record in changed:
            has_grown = seq.block_table[: len(record.table)] == record.table
            if not has_grown or seq.num_computed < record.num_computed:
                releases += find_releases(seq, record, plan)
        if len(releases) > 1 or self.has_windows:
            releases = in_order(releases, self.find_cached(releases))
        for release in releases:
            match release.kind:
                case Kind.END:
                    self.write_end(release.seq, release.record)
                case Kind.WINDOW:
                    self.write_window(release)
                case Kind.REJECTED:
                    self.write_rejected(release, plan)

    def find_cached(self, releases: list[Release]) -> list[int]:
        """The released blocks that are cached now, in the order in which they became cached. They
        are the last ones in the pool's list."""
        released = {block for release in releases for block in release.blocks}
        cached = self.scheduler.blocks.pool.cached
        num_cached = sum([block in cached for block in released])
        newest_first = []
        blocks = reversed(cached)
        while len(newest_first) < num_cached:
            block = next(blocks)
            if block in released:
                newest_first.append(block)
        return newest_first[::-1]

    def write_window(self, release: Release) -> None:
        """Write that blocks have left the window of their layers."""
        record = release.record
        self.write_published(release.seq, record)
        for index, block in enumerate(record.table):
            if block in release.blocks:
                record.table[index] = NULL_BLOCK
        self.log.add("window", seq=record.number, blocks=release.blocks)

    def write_rejected(self, release: Release, plan: Plan) -> None:
        """Write that draft tokens were rejected, or that planned steps with blocks were dropped."""
        record = release.record
        starts = [chunk.start for chunk in plan.chunks if chunk.seq is release.seq]
        record.num_computed = starts[0] if starts else release.seq.num_computed
        num_kept = len(record.table) - len(release.blocks)
        blocks = record.table[num_kept:].tolist()
        del record.table[num_kept:]
        self.log.add("reject", seq=record.number, computed=record.num_computed, blocks=blocks)

    def write_end(self, seq: Sequence, record: Record) -> None:
        """Write that a sequence was preempted or has ended."""
        if record.table:
            self.write_published(seq, record)
            self.log.add("free", seq=record.number)
            del self.running[seq]
        if seq.finish_reason is None:
            self.waiting[seq] = Record(record.number, record.num_tokens)
            self.log.add("preempt", seq=record.number)
        elif seq.finish_reason == "abort":
            self.log.add("abort", seq=record.number)
        else:
            self.log.add("finish", seq=record.number, reason=seq.finish_reason)

    # blocks that were allocated

    def write_published(self, seq: Sequence, record: Record) -> None:
        """Write the blocks of the recorded table that have become findable by the hash of this
        sequence's text."""
        hash_of = self.scheduler.blocks.pool.hash_of
        start = record.num_published * self.num_groups
        stop = len(seq.block_hashes) * self.num_groups
        for index, block in enumerate(record.table[start:stop], start):
            content_hash = self.evicted.get(block) or hash_of.get(block)
            if content_hash is None or self.hash_of.get(block) == content_hash:
                continue
            # otherwise the block has another sequence's text already
            if content_hash.startswith(seq.block_hashes[index // self.num_groups]):
                self.hash_of[block] = content_hash
                facts = {"block": block, "hash": content_hash.hex()}
                self.log.add("publish", seq=record.number, **facts)

    def write_growth(self, seq: Sequence, record: Record) -> None:
        """Write new blocks at the end of a table, and copies of shared blocks."""
        table = seq.block_table
        num_before = len(record.table)
        if table[:num_before] != record.table:
            for index, source in enumerate(record.table):
                target = table[index]
                if target != source:
                    self.write_evictions([target])
                    facts = {"index": index, "source": source, "target": target}
                    self.log.add("copy", seq=record.number, **facts)
        new = table[num_before:].tolist()
        if new:
            self.write_evictions(new)
            self.log.add("allocate", seq=record.number, blocks=new)
        record.table = table[:]

    def write_evictions(self, blocks: list[int]) -> None:
        """Write which of these blocks were evicted."""
        for block in blocks:
            content_hash = self.evicted.pop(block, None)
            if content_hash is not None and self.hash_of.get(block) == content_hash:
                del self.hash_of[block]
                self.log.add("evict", block=block)

    def write_new_tables(self, plan: Plan) -> None:
        """Write sequences that have left the queue, and samples that begin."""
        starts = {seq: start for seq, start, _, _ in plan.chunks}
        parents = {}
        if plan.forks:
            parents = {draw.seq: plan.chunks[draw.chunk_index].seq for draw in plan.draws}
        forks = set(plan.forks)
        for seq in self.scheduler.running:
            if seq in forks:
                self.write_fork(seq, self.running[parents[seq]])
            elif seq in self.running:
                continue
            elif seq in starts:
                self.write_admission(seq, starts[seq])
            else:
                self.write_table(seq)
        for seq in self.scheduler.paused:
            if seq.block_table and seq not in self.running:
                self.write_table(seq)

    def write_table(self, seq: Sequence) -> None:
        """Write a sequence that had its table before the trace began, or that shares a table."""
        record = self.waiting.pop(seq)
        record.table = seq.block_table[:]
        record.num_computed = seq.num_computed
        record.num_published = seq.num_published
        self.running[seq] = record
        table = record.table.tolist()
        self.log.add("resume", seq=record.number, table=table, computed=seq.num_computed)

    def write_admission(self, seq: Sequence, num_cached: int) -> None:
        """Write an admission. num_cached: number of tokens found in the prefix cache."""
        blocks = self.scheduler.blocks
        record = self.waiting.pop(seq)
        self.running[seq] = record
        record.num_computed = num_cached
        record.num_published = num_cached // blocks.block_size
        num_hits = record.num_published * self.num_groups
        record.table = seq.block_table[:num_hits]
        self.log.add("admit", seq=record.number, computed=num_cached)
        if num_hits:
            self.log.add("hit", seq=record.number, blocks=record.table.tolist())
        num_wanted = seq.max_cached_tokens // blocks.block_size * self.num_groups
        if blocks.enable_prefix_caching and num_wanted > num_hits:
            self.log.add("miss", seq=record.number, count=num_wanted - num_hits)
        self.write_growth(seq, record)
        self.write_published(seq, record)
        record.num_published = seq.num_published

    def write_fork(self, seq: Sequence, parent: Record) -> None:
        """Write a sample that begins with the tokens and the table of another one."""
        record = Record(
            number=next(self.sequence_numbers),
            num_tokens=parent.num_tokens,
            table=seq.block_table[:],
            num_computed=seq.num_computed,
            num_published=seq.num_published,
        )
        self.running[seq] = record
        facts = {"parent": parent.number, "sample": seq.index, "computed": seq.num_computed}
        self.log.add("fork", seq=record.number, **facts)
