"""Step 7: the prefix cache: a prompt finds blocks that another text has computed. The page:
07-prefix-cache.md.

K and V of a block depend only on its tokens and the tokens before it. A hash of these identifies
the block, and a dictionary of hashes finds it, even if no text uses it any more: a free block keeps
its content until it is allocated again. The least recently used block is allocated first.
"""

from collections import OrderedDict, deque

import common
from common import BLOCK, Memory, PoolFull, Sequence


class Pool:
    """The blocks: free or in use, and the hashes by which they can be found."""

    def __init__(self, num_blocks, meter):
        self.memory, self.meter = Memory(num_blocks), meter
        self.free = OrderedDict.fromkeys(range(num_blocks))  # the least recently used first
        self.ref_count = [0] * num_blocks  # the number of tables that contain the block
        self.hash_of, self.block_of = {}, {}  # for findable blocks, free or in use

    def allocate(self):
        if not self.free:
            raise PoolFull(f"all of {len(self.ref_count)} blocks are in use")
        block, _ = self.free.popitem(last=False)
        if block in self.hash_of:  # its content can no longer be found
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
            if block not in self.hash_of:  # its content is useless: allocate it first
                self.free.move_to_end(block, last=False)

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
                self.share(block)
        seq.num_forks = 0
        return forks

    def release(self, seq):
        for block in reversed(seq.table):  # so that the end of a text is evicted first
            self.drop(block)
        seq.table, seq.num_computed = [], 0

    def hashes(self, tokens):
        """One hash for each full block of a text: of its tokens and all tokens before it."""
        chain = [None]
        for i in range(len(tokens) // BLOCK):
            chain.append(hash((chain[-1], *tokens[i * BLOCK : (i + 1) * BLOCK])))
        return chain[1:]

    def find(self, seq):
        """Share the blocks of the longest prefix of the text that can be found."""
        for h in self.hashes(seq.tokens[:-1]):  # not the last token: its row gives the logits
            if h not in self.block_of:
                break
            seq.table.append(self.block_of[h])
            self.share(seq.table[-1])
        seq.num_computed = len(seq.table) * BLOCK

    def publish(self, seq, stop):
        """Make the full blocks before `stop` findable."""
        for block, h in zip(seq.table, self.hashes(seq.tokens[:stop]), strict=False):
            if h not in self.block_of and block not in self.hash_of:
                self.block_of[h], self.hash_of[block] = block, h


def serve(model, requests, meter, memory=common.MEMORY):
    """Answer all requests in one loop; memory: number of tokens whose K and V fit."""
    waiting, running = deque(map(Sequence, requests)), []
    pool = Pool(memory // BLOCK, meter)
    while waiting or running:
        # new texts: start them while their prompt fits, with one more block for each sample
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
            pool.publish(seq, len(seq.tokens))  # the next text may find them
            meter.counts["rows found in the cache"] += seq.num_computed
        # one call for the prompts of the new texts; if there are none, for the next token of all
        chunks = [(seq, seq.num_computed, len(seq.tokens)) for seq in new or running]
        for seq in [] if new else running:  # new texts have their blocks already
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
        "{rows computed} rows for {tokens generated} tokens."
    )
    return common.compare(
        serve, "step06_sharing", common.shared_beginning, problem, memory=2048, **options
    )


if __name__ == "__main__":
    main()
