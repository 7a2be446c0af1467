"""Step 9: no phases: a call mixes parts of prompts with next tokens. The page: 09-no-phases.md.

A text has tokens, and some of them are computed. Each call computes more: first for running texts,
then for new ones, until a budget of rows is used up. No text waits for a whole long prompt.
"""

from collections import OrderedDict, deque

import common
from common import BLOCK, Memory, PoolFull, Sequence

BUDGET = 32  # the largest number of rows in a call


class Pool:
    """The blocks: free or in use, and the hashes by which they can be found."""

    def __init__(self, num_blocks, meter):
        self.memory, self.meter = Memory(num_blocks), meter
        self.free = OrderedDict.fromkeys(range(num_blocks))  # the least recently used first
        self.ref_count = [0] * num_blocks  # the number of tables that contain the block
        self.hash_of, self.block_of = {}, {}  # for findable blocks, free or in use

    def allocate(self):
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

    def grow(self, seq, stop):
        """Blocks for the tokens before `stop`, see step 8. Returns False if too few are free."""
        table, first = seq.table, seq.num_computed // BLOCK
        copies = first < len(table) and self.ref_count[table[first]] > 1
        if copies + max(0, -(-stop // BLOCK) - len(table)) > len(self.free):
            return False
        if copies:
            shared, table[first] = table[first], self.allocate()
            self.memory.copy(shared, table[first])
            self.drop(shared)
            self.meter.counts["blocks copied"] += 1
        while len(table) * BLOCK < stop:
            table.append(self.allocate())
        return True

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
        chunks, budget, is_full = [], BUDGET, False
        for seq, rows in common.divide(running, budget):
            stop = seq.num_computed + rows  # first the rows of the running texts
            while stop > seq.num_computed and seq in running and not pool.grow(seq, stop):
                victim, is_full = running.pop(), True  # the youngest; may be `seq` itself
                pool.release(victim)
                waiting.appendleft(victim)
                meter.counts["preemptions"] += 1
            if stop > seq.num_computed and seq in running:
                chunks.append((seq, seq.num_computed, stop))
                budget -= stop - seq.num_computed
        while waiting and budget and not is_full:  # then new texts, as many as fit
            seq, samples = waiting[0], sum(1 + seq.num_forks for seq in running)
            pool.find(seq)
            stop = min(len(seq.tokens), seq.num_computed + budget)
            # with one more block for each sample: otherwise one would be preempted at once
            fresh = -(-stop // BLOCK) - len(seq.table)
            if fresh + (samples + seq.request.n if running else 0) > len(pool.free):
                pool.release(seq)
                break
            running.append(waiting.popleft())
            pool.grow(seq, stop)
            pool.publish(seq, stop)  # the next text may find them
            meter.counts["rows found in the cache"] += seq.num_computed
            chunks.append((seq, seq.num_computed, stop))
            budget -= stop - seq.num_computed
        if not chunks:
            raise PoolFull(f"request {waiting[0].request.id} needs more than the whole pool")
        logits = common.call(model, pool.memory, chunks, running, meter)
        for (seq, _, stop), row in zip(chunks, logits, strict=True):
            pool.publish(seq, stop)
            if stop < len(seq.tokens):
                continue  # the prompt is not complete yet
            running += (forks := pool.fork(seq))
            for each in [seq, *forks]:
                each.tokens.append(common.pick(row, each.request, each.sample, stop))
                meter.token(each.request, each.sample, each.tokens)
        for seq in [seq for seq in running if seq.request.is_done(seq.tokens)]:
            running.remove(seq)
            pool.release(seq)


def main(**options):
    problem = "a text waits for {most rows between two tokens} rows before its next token."
    requests = common.long_prompt
    return common.compare(serve, "step08_preemption", requests, problem, memory=272, **options)


if __name__ == "__main__":
    main()
