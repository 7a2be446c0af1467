"""Step 7: the prefix cache: a prompt finds blocks that another text has computed. The page:
07-prefix-cache.md.

K and V of a block follow from its tokens and those before it. So a hash of all these names the
block's content, and a table of hashes finds it, also when no text has it any more: a free block
keeps its content until it is handed out again, the least recently used one first.
"""

from collections import OrderedDict, deque

import common
from common import BLOCK, Memory, PoolFull, Sequence


class Pool:
    """Which blocks are free, which are in use, and which can be found by their content."""

    def __init__(self, num_blocks, meter):
        self.memory, self.meter = Memory(num_blocks), meter
        self.free = OrderedDict.fromkeys(range(num_blocks))  # the least recently used first
        self.ref_count = [0] * num_blocks  # in how many tables a block is
        self.hash_of, self.block_of = {}, {}  # of blocks that can be found, free or in use

    def allocate(self):
        if not self.free:
            raise PoolFull(f"all of {len(self.ref_count)} blocks are in use")
        block, _ = self.free.popitem(last=False)
        if block in self.hash_of:  # what was in it can no longer be found
            del self.block_of[self.hash_of.pop(block)]
            self.meter.counts["blocks evicted"] += 1
        self.ref_count[block] = 1
        return block

    def share(self, block):
        self.free.pop(block, None)
        self.ref_count[block] += 1

    def drop(self, block):
        self.ref_count[block] -= 1
        if self.ref_count[block] == 0:
            self.free[block] = None
            if block not in self.hash_of:  # nothing worth keeping: it goes first
                self.free.move_to_end(block, last=False)

    def grow(self, seq):
        """Give a text the blocks that it needs for all of its tokens, and make the one that it
        writes to next its own."""
        table, first = seq.table, seq.num_computed // BLOCK
        if first < len(table) and self.ref_count[table[first]] > 1:
            shared, table[first] = table[first], self.allocate()
            self.memory.copy(shared, table[first])
            self.drop(shared)
            self.meter.counts["blocks copied"] += 1
        while len(table) * BLOCK < len(seq.tokens):
            table.append(self.allocate())

    def fork(self, seq):
        """The other samples of a text, with the same tokens on the same blocks."""
        forks = [Sequence(seq.request, 1 + i) for i in range(seq.num_forks)]
        for fork in forks:
            fork.num_forks, fork.num_computed, fork.table = 0, seq.num_computed, list(seq.table)
            for block in fork.table:
                self.share(block)
        seq.num_forks = 0
        return forks

    def release(self, seq):
        for block in reversed(seq.table):  # so the end of a text is evicted before its beginning
            self.drop(block)
        seq.table, seq.num_computed = [], 0

    def hashes(self, tokens):
        """A hash of each full block of a text, and of all that is before the block."""
        found = [None]
        for i in range(len(tokens) // BLOCK):
            found.append(hash((found[-1], *tokens[i * BLOCK : (i + 1) * BLOCK])))
        return found[1:]

    def find(self, seq):
        """Share the blocks of the longest beginning of the text that can be found."""
        for h in self.hashes(seq.tokens[:-1]):  # the last token's row is needed: it gives logits
            if h not in self.block_of:
                break
            seq.table.append(self.block_of[h])
            self.share(seq.table[-1])
        seq.num_computed = len(seq.table) * BLOCK

    def publish(self, seq, stop):
        """Let the full blocks before `stop` be found."""
        for block, h in zip(seq.table, self.hashes(seq.tokens[:stop]), strict=False):
            if h not in self.block_of and block not in self.hash_of:
                self.block_of[h], self.hash_of[block] = block, h


def serve(model, requests, meter, memory=common.MEMORY):
    """Answer all requests in one loop; memory: tokens whose K and V there is room for."""
    waiting, running = deque(map(Sequence, requests)), []
    pool = Pool(memory // BLOCK, meter)
    while waiting or running:
        # the new ones: all whose prompt fits, with a block more for each sample
        new, samples = [], sum(1 + seq.num_forks for seq in running)
        while waiting:
            seq = waiting[0]
            pool.find(seq)
            fresh = -(-len(seq.tokens) // BLOCK) - len(seq.table)
            if fresh + (samples + seq.request.n if running else 0) > len(pool.free):
                pool.release(seq)
                break
            new.append(waiting.popleft())
            running.append(seq)
            samples += 1 + seq.num_forks
            pool.grow(seq)
            pool.publish(seq, len(seq.tokens))  # the next one may find it: it is written first
            meter.counts["rows found in the cache"] += seq.num_computed
        # a call for the prompts of the new ones, else one for the next token of all
        chunks = [(seq, seq.num_computed, len(seq.tokens)) for seq in new or running]
        for seq in [] if new else running:  # the new ones have their blocks
            pool.grow(seq)
        if not chunks:
            raise PoolFull(f"request {waiting[0].request.id} needs more than the whole pool")
        logits = common.call(model, pool.memory, chunks, running, meter)
        for (seq, _, stop), row in zip(chunks, logits, strict=True):
            pool.publish(seq, stop)
            running += (forks := pool.fork(seq))
            for each in [seq, *forks]:
                each.tokens.append(common.pick(row, each.request, each.sample, stop))
                meter.token(each.request, each.sample, each.tokens)
        for seq in [seq for seq in running if seq.request.is_done(seq.tokens)]:
            running.remove(seq)
            pool.release(seq)


def main(**options):
    problem = (
        "twelve prompts begin with the same text, and step 6 computes it twelve times: "
        "{rows computed} rows for {tokens made} tokens."
    )
    return common.compare(
        serve, "step06_sharing", common.shared_beginning, problem, memory=2048, **options
    )


if __name__ == "__main__":
    main()
