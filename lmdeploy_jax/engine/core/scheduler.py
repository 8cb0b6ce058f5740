"""Which tokens the next step computes. Pure Python: pages, slots and budgets, no arrays."""

from __future__ import annotations

from collections import deque
from itertools import islice

from lmdeploy_jax.cache.encoder_cache import EncoderCacheManager, ViewKey, views_ahead
from lmdeploy_jax.cache.manager import CacheManager
from lmdeploy_jax.cache.pages import PAGE_SIZE
from lmdeploy_jax.engine.core.prefix_states import copy_states, cut_at_end
from lmdeploy_jax.engine.core.step import Chunk, Step
from lmdeploy_jax.engine.request import PromptReport, Request, Sequence, Status

JOINING_TOKENS = (256, 384, 512)  # of a step in which prompts join up to 127, 191 and more that decode
BURST_TOKENS = 4096  # of prompts that could join at once; from then on they go first, until all are in
PAUSE_TOKENS = 131072  # of a burst for which those who decode wait at most; the rest joins beside them
LEAST_JOINING_TOKENS = 128  # of prompts, however many decode


class DrainFirst(Exception):
    """A sequence must be preempted whose last tokens are not read yet: read all steps, then schedule
    again.
    """


class Scheduler:
    """Continuous batching: running sequences first, then prompts in order of arrival, within a token budget.

    Prompts join those who decode at full speed, unless somebody reads along: then in small chunks, so that
    tokens come in an even flow, or, if many come at once, before the next token, so that there is one pause
    instead of many. `max_tokens` bounds a step, `max_batch_size` the sequences that hold a slot. All pages
    that a prompt needs at once are taken when it is admitted, so that as a rule only decoding can run out of
    them; then the latest sequence is preempted and computed again later. So is, at once, a sequence that
    outgrows `rope_switch`, see `RopeConfig.switch_length`.
    """

    def __init__(
        self,
        cache: CacheManager,
        *,
        max_batch_size: int,
        max_tokens: int,
        session_len: int,
        rope_switch: int | None = None,
        decode_steps: int = 1,
        encoder_cache: EncoderCacheManager | None = None,
    ) -> None:
        self.cache = cache
        self.encoder_cache = encoder_cache
        self.max_tokens = max_tokens
        self.session_len = session_len
        self.rope_switch = rope_switch
        self.decode_steps = decode_steps
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._slots = list(range(max_batch_size))[::-1]
        self._admitted: list[Sequence] = []
        self._burst = False
        self._spare = 0  # tokens of the step beyond its budget, for images that must not be cut
        self._paused = 0  # tokens of the burst that were taken in while decoding stood still

    # -- requests in and out ------------------------------------------------------------------------------

    def add(self, request: Request) -> Sequence:
        """Queue a request; returns the first of its sequences, whose siblings wait with it."""
        first, *siblings = (Sequence(request, i, list(request.prompt.ids)) for i in range(request.params.n))
        first.siblings = siblings
        first.report = PromptReport() if request.params.reports_prompt else None
        self.waiting.append(first)
        return first

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it stands, and give its pages and slot back."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
            known = min(sequence.computed, len(sequence.tokens))
            self._register(sequence, known)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        else:
            self._leave_first(sequence)
        for sibling in sequence.siblings:
            self._vacate(sibling)
            sibling.status = Status.FINISHED
        self._vacate(sequence)
        sequence.status = Status.FINISHED

    def discard_cache(self, sequence: Sequence) -> list[int]:
        """Let nothing of what a running sequence has computed be found again; returns the pages that only
        it uses.
        """
        sequence.computed = 0
        return self.cache.discard(sequence.pages, sequence.hashes)

    def _leave_first(self, sibling: Sequence) -> None:
        """Take a sibling that has not forked yet out of its first sequence's group."""
        for first in (*self.waiting, *self.running):
            if sibling in first.siblings:
                first.siblings.remove(sibling)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def check_integrity(self) -> None:
        """Raise AssertionError unless pages and slots are exactly those the sequences hold."""
        holders = [s for r in self.running for s in (r, *r.siblings)]
        self.cache.pool.check_integrity(page for s in holders for page in s.pages.pages)
        slots = sorted([*self._slots, *(s.slot for s in holders)])
        assert slots == list(range(len(slots))), "slots were lost or doubled"

    # -- planning -----------------------------------------------------------------------------------------

    def schedule(self) -> Step | None:
        """The next step, or None where nothing can be computed now. Raises `DrainFirst`."""
        chunks = self._chunks()
        while not chunks and self._stuck:
            self._preempt(self.running[-1])
            chunks = self._chunks()
        if not chunks:
            return None
        step = self._commit(chunks)
        step.admitted, self._admitted = self._admitted, []
        if self.cache.states is not None:
            copy_states(step, self.cache)
        if self.decode_steps > 1 and self._can_repeat(step):
            self._repeat(step)
        return step

    def _chunks(self) -> list[Chunk]:
        chunks = self._burst_chunks()
        if not chunks:
            chunks = self._decode_chunks()
            budget = self._token_budget(chunks)
            if self.encoder_cache is not None:
                self._spare = self.max_tokens - budget
                self._begin_encoding(any(chunk.sequence.request.streams for chunk in chunks))
            chunks += self._prompt_chunks(budget - len(chunks))
        return chunks

    def _begin_encoding(self, joining: bool) -> None:
        """joining: somebody waits for a next token while images are encoded."""

        def needed() -> set[ViewKey]:
            unfinished = (sequence for sequence in self.running if sequence.request.prompt.images)
            return {key for s in unfinished for key in views_ahead(s.request.prompt, s.computed)}

        if self.encoder_cache is not None:
            self.encoder_cache.begin_step(joining=joining, needed=needed)

    @property
    def _stuck(self) -> bool:
        """Whether prompts are under way: if none of them can go on, they wait for each other's pages."""
        return any(not sequence.pending for sequence in self.running)

    def _ready(self, sequence: Sequence) -> bool:
        """Whether its next token can be computed now, as far as the sequence itself goes."""
        length = sequence.length
        if not sequence.pending:
            return False  # its prompt is under way, of which images may have to be encoded
        if length >= sequence.max_length or length >= self.session_len:
            return False  # its last tokens are under way
        return not (sequence.unread and sequence.params.needs_host)

    def _decode_chunks(self) -> list[Chunk]:
        chunks: list[Chunk] = []
        for sequence in list(self.running):
            if not self._ready(sequence):
                continue
            if self.rope_switch is not None and self._outgrows(sequence, self.rope_switch):
                self._preempt(sequence)
                sequence.rope_floor = sequence.length
            elif sequence.computed < sequence.pages.room or self._make_room(sequence):
                self._register(sequence, sequence.computed)  # not the next token: the plan may be dropped yet
                chunks.append(self._plan(sequence, 1))
        return chunks

    def _outgrows(self, sequence: Sequence, switch: int) -> bool:
        return sequence.rope_len <= switch < sequence.length

    def _make_room(self, sequence: Sequence) -> bool:
        """Pages for the sequence's next token; false where the sequence itself had to give way."""
        while not self._hold(sequence, sequence.computed + 1):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _hold(self, sequence: Sequence, end: int) -> bool:
        """The pages that the next of its first `end` tokens need, if there are enough."""
        position, cache = sequence.computed, self.cache
        enough = cache.missing(sequence.pages, position, end) <= cache.pool.available
        if enough:
            cache.hold(sequence.pages, position, end)
        return enough

    def _burst_chunks(self) -> list[Chunk]:
        """Prompts alone where many have come at once and somebody reads along; else nothing."""
        left = self._joinable_tokens()
        self._burst = left > BURST_TOKENS or (self._burst and left > 0)
        if not self._burst:
            self._paused = 0
            return []
        reads = any(sequence.request.streams and self._ready(sequence) for sequence in self.running)
        if not reads or self._paused >= PAUSE_TOKENS:
            return []
        self._spare = 0
        self._begin_encoding(True)
        chunks = self._prompt_chunks(self.max_tokens)
        self._paused += sum(chunk.count for chunk in chunks)
        return chunks

    def _joinable_tokens(self) -> int:
        """Tokens not computed yet of prompts that have a slot or would get one; beyond a burst not all.

        Prompts with images always join beside those who decode, one small run of the encoder a step.
        """
        left = sum(s.remaining for s in self.running if not (s.pending or s.request.prompt.images))
        for sequence in islice(self.waiting, len(self._slots)):
            if left > BURST_TOKENS:
                break
            left += 0 if sequence.request.prompt.images else sequence.remaining
        return left

    def _token_budget(self, decoding: list[Chunk]) -> int:
        """Most tokens of a step in which `decoding` sequences get their next one."""
        if self._burst or not any(chunk.sequence.request.streams for chunk in decoding):
            return self.max_tokens
        count = len(decoding)
        joining = JOINING_TOKENS[min(max(count // 64 - 1, 0), len(JOINING_TOKENS) - 1)]
        return min(max(joining, count + LEAST_JOINING_TOKENS), self.max_tokens)

    def _prompt_chunks(self, budget: int) -> list[Chunk]:
        """Of prompts that are under way, then of those that wait."""
        unfinished = [sequence for sequence in self.running if not sequence.pending]
        chunks = self._prefill_chunks(unfinished, budget)
        return chunks + self._admit(budget - sum(chunk.count for chunk in chunks))

    def _prefill_chunks(self, unfinished: list[Sequence], budget: int) -> list[Chunk]:
        chunks: list[Chunk] = []
        for sequence in unfinished:
            if budget > 0 and self._hold(sequence, sequence.length):
                budget -= self._plan_prompt(sequence, budget, chunks)
        return chunks

    def _admit(self, budget: int) -> list[Chunk]:
        chunks: list[Chunk] = []
        while self.waiting and budget > 0 and self._take_in(self.waiting[0]):
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            budget -= self._plan_prompt(sequence, budget, chunks)
        return chunks

    def _plan_prompt(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        """As much of its prompt as the budget and its images allow, which may be nothing: what of the budget
        that takes. What it holds for that is more than it needs later.

        Pages that it fills can be shared at once, by prompts of the same step too: in every layer all keys
        and values of a step are written before any is read.
        """
        sequence.pages.room = 0
        start, count = sequence.computed, min(sequence.remaining, budget)
        count = cut_at_end(sequence, count) if sequence.state_ends else count
        encoding, prompt = 0, sequence.request.prompt
        if self.encoder_cache is not None and prompt.images:
            count, encoding = self.encoder_cache.plan(prompt, start, count, budget, self._spare)
        if count:
            chunks.append(self._plan(sequence, count))
            self._register(sequence, start + count)
        return count + encoding

    def _plan(self, sequence: Sequence, count: int) -> Chunk:
        """The next `count` tokens."""
        from_device = sequence.computed + count == sequence.length and sequence.pending
        return Chunk(sequence, sequence.computed, count, from_device)

    def _register(self, sequence: Sequence, computed: int) -> None:
        """Let the pages that `computed` tokens fill be found."""
        if computed >= (len(sequence.hashes) + 1) * PAGE_SIZE:
            prompt = sequence.request.prompt
            self.cache.register(prompt, sequence.tokens, computed, sequence.pages, sequence.hashes)

    def _take_in(self, sequence: Sequence) -> bool:
        """Give a waiting sequence and its siblings slots and the pages of the whole prompt, or nothing."""
        if len(self._slots) < 1 + len(sequence.siblings):
            return False
        tokens = sequence.tokens
        limit = 0 if sequence.report else len(tokens) - 1
        cache = self.cache
        found = cache.match(sequence.request.prompt, tokens, limit, sequence.hashes)
        pages, computed = found.pages, len(found.hashes) * PAGE_SIZE
        partial = len(sequence.siblings) * (len(tokens) % PAGE_SIZE > 0)
        reserve = len(self.running) // 2  # soon wanted by those who run already
        needed = cache.missing(pages, computed, len(tokens)) + (partial + reserve) * len(cache.groups)
        if needed > cache.pool.available:
            cache.release(pages)
            return False
        sequence.computed, sequence.pages, sequence.hashes = computed, pages, found.hashes
        sequence.state, sequence.state_ends = found.state, cache.state_ends(found, len(tokens))
        if sequence.num_generated == 0:
            sequence.cached = computed
        if self.encoder_cache is not None and sequence.request.prompt.images:
            self.encoder_cache.note_query(sequence.request.prompt, computed)
        cache.hold(pages, computed, len(tokens))
        self._occupy(sequence, Status.RUNNING)
        for sibling in sequence.siblings:
            sibling.pages = cache.take_last(len(tokens))
            self._occupy(sibling, Status.FORKING)
        return True

    def _occupy(self, sequence: Sequence, status: Status) -> None:
        sequence.slot = self._slots.pop()
        sequence.status, sequence.table_version, sequence.pending = status, -1, False
        self._admitted.append(sequence)

    def _vacate(self, sequence: Sequence) -> None:
        self.cache.release(sequence.pages, clean=len(sequence.tokens) > sequence.num_prompt)
        sequence.hashes = []
        sequence.computed, sequence.pending = 0, False
        sequence.state, sequence.state_ends = None, ()
        if sequence.slot >= 0:
            self._slots.append(sequence.slot)
            sequence.slot = -1

    def _preempt(self, victim: Sequence) -> None:
        if victim.unread:
            raise DrainFirst
        self.running.remove(victim)
        for sequence in (victim, *victim.siblings):
            self._vacate(sequence)
            sequence.status = Status.WAITING
        victim.report = PromptReport() if victim.report else None
        self.waiting.appendleft(victim)
        self.preemptions += 1

    # -- several decode steps at once -----------------------------------------------------------------------

    def _can_repeat(self, step: Step) -> bool:
        """Whether nothing waits for the next token but the token after it, and there are pages enough."""
        if self.waiting or not step.decode_only or step.encoder_runs or self.rope_switch is not None:
            return False
        if any(not sequence.params.repeats for sequence, _ in step.sampled):
            return False
        missing = sum(self._pages_missing(sequence) for sequence, _ in step.sampled)
        return missing <= self.cache.pool.available

    def _pages_missing(self, sequence: Sequence) -> int:
        return max(self.cache.missing(sequence.pages, sequence.computed - 1, self._repeated_end(sequence)), 0)

    def _repeated_end(self, sequence: Sequence) -> int:
        """The tokens whose keys and values are in the cache after a step that was to draw one and repeats."""
        return min(sequence.computed - 1 + self.decode_steps, sequence.max_length, self.session_len)

    def _repeat(self, step: Step) -> None:
        """What it draws beyond the end of a sequence is cut off when it is read."""
        step.repeat = self.decode_steps
        for sequence, _ in step.sampled:
            end = self._repeated_end(sequence)
            if end > sequence.pages.room:
                self.cache.hold(sequence.pages, sequence.computed - 1, end)
            sequence.computed += step.repeat - 1
            sequence.unread += step.repeat - 1

    # -- what a planned step changes ----------------------------------------------------------------------

    def _commit(self, chunks: list[Chunk]) -> Step:
        step = Step(chunks, unclean=self.cache.pool.pop_taken_unclean())
        for row, chunk in enumerate(chunks):
            sequence = chunk.sequence
            sequence.computed += chunk.count
            if sequence.remaining == 0:
                drawing = [sequence]
                if sequence.siblings:
                    self._fork(sequence, step)
                    drawing += sequence.siblings
                    sequence.siblings = []
                for drawn in drawing:
                    drawn.unread += 1
                    drawn.pending = True
                    step.sampled.append((drawn, row))
        if self.encoder_cache is not None:
            step.encoder_runs = self.encoder_cache.take_runs()
        if self.encoder_cache is not None and not step.decode_only:
            parts = [(c.sequence.request.prompt, c.start, c.start + c.count) for c in chunks]
            step.embedding_index = self.encoder_cache.index(parts)
            step.lookahead = self.encoder_cache.lookahead(parts)
        return step

    def _fork(self, first: Sequence, step: Step) -> None:
        """Siblings start on the shared prompt pages; a last, partly filled page is copied for each."""
        for sibling in first.siblings:
            step.copies += self.cache.fork(first.pages, sibling.pages)
            step.kept.append((first.slot, sibling.slot))
            sibling.hashes = list(first.hashes)
            sibling.computed, sibling.cached, sibling.status = first.computed, first.cached, Status.RUNNING
            self.running.append(sibling)
