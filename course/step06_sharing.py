"""Step 6: several samples share the blocks of their prompt. The page: 06-sharing.md.

A block may be in several tables, so the pool counts the references to each block. A sample that
writes into a shared block first gets a copy of it (copy-on-write).
"""

from collections import deque

import common
from common import BLOCK, Memory, PoolFull, Sequence


class Pool:
    """The free blocks, and the reference counts of the others."""

    def __init__(self, num_blocks, meter):
        self.memory, self.meter = Memory(num_blocks), meter
        self.free = list(range(num_blocks))
        self.ref_count = [0] * num_blocks  # the number of tables that contain the block

    def allocate(self):
        if not self.free:
            raise PoolFull(f"all of {len(self.ref_count)} blocks are in use")
        block = self.free.pop()
        self.ref_count[block] = 1
        return block

    def drop(self, block):
        self.ref_count[block] -= 1
        if self.ref_count[block] == 0:
            self.free.append(block)

    def grow(self, seq):
        """Give a text the blocks for all of its tokens, and copy the block that it writes to next
        if it is shared."""
        table, first = seq.table, seq.num_computed // BLOCK
        if first < len(table) and self.ref_count[table[first]] > 1:
            shared, table[first] = table[first], self.allocate()
            self.memory.copy(shared, table[first])
            self.drop(shared)
            self.meter.counts["blocks copied"] += 1
        while len(table) * BLOCK < len(seq.tokens):
            table.append(self.allocate())

    def fork(self, seq):
        """Make the other samples of a text, with the same tokens and the same blocks."""
        forks = [Sequence(seq.request, 1 + i) for i in range(seq.num_forks)]
        for fork in forks:
            fork.num_forks, fork.num_computed, fork.table = 0, seq.num_computed, list(seq.table)
            for block in fork.table:
                self.ref_count[block] += 1
        seq.num_forks = 0
        return forks

    def release(self, seq):
        for block in seq.table:
            self.drop(block)
        seq.table = []


def serve(model, requests, meter, memory=common.MEMORY):
    """Answer all requests in one loop; memory: number of tokens whose K and V fit."""
    waiting, running = deque(map(Sequence, requests)), []
    pool = Pool(memory // BLOCK, meter)
    while waiting or running:
        # new texts: start them while their prompt fits, with one more block for each sample
        new, samples = [], sum(1 + seq.num_forks for seq in running)
        while waiting:
            seq = waiting[0]
            fresh = -(-len(seq.tokens) // BLOCK)
            if fresh + (samples + seq.request.n if running else 0) > len(pool.free):
                break
            new.append(waiting.popleft())
            running.append(seq)
            samples += 1 + seq.num_forks
            pool.grow(seq)
        # one call for the prompts of the new texts; if there are none, for the next token of all
        chunks = [(seq, seq.num_computed, len(seq.tokens)) for seq in new or running]
        for seq in [] if new else running:  # new texts have their blocks already
            pool.grow(seq)
        if not chunks:
            raise PoolFull(f"request {waiting[0].request.id} needs more than the whole pool")
        logits = common.call(model, pool.memory, chunks, running, meter)
        for (seq, _, stop), row in zip(chunks, logits, strict=True):
            running += (forks := pool.fork(seq))
            for each in [seq, *forks]:
                each.tokens.append(common.pick(row, each.request, each.sample, stop))
                meter.token(each.request, each.sample, each.tokens)
        for seq in [seq for seq in running if seq.request.is_done(seq.tokens)]:
            running.remove(seq)
            pool.release(seq)


def main(**options):
    problem = (
        "for 4 samples of each prompt, step 5 computes and stores each prompt 4 times: "
        "{rows computed} rows, {peak KV bytes reserved} bytes of K and V."
    )
    return common.compare(serve, "step05_blocks", common.samples, problem, memory=2048, **options)


if __name__ == "__main__":
    main()
