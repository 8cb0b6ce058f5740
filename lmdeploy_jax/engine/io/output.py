"""Between the engine's thread and the readers: a worker that turns tokens into Responses."""

from __future__ import annotations

import logging
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence

from lmdeploy_jax.engine.io.answer import Answer, OutputOptions
from lmdeploy_jax.engine.merged_output import MergedOutput
from lmdeploy_jax.engine.request import StepOutput
from lmdeploy_jax.messages import Response
from lmdeploy_jax.text.tokenizer import Tokenizer

logger = logging.getLogger("lmdeploy_jax")

Sink = Callable[[Response], None]  # called on the worker's thread; must not block
Flush = Callable[[], None]  # called there after each batch of pieces
Abort = Callable[[int, int | None], None]  # (request id, which of its sequences)


class OutputProcessor:
    """One worker thread that turns `StepOutput`s into `Response`s.

    Outputs that wait are taken together, so that a worker that falls behind does less work for each token.
    """

    def __init__(self, tokenizer: Tokenizer, abort: Abort) -> None:
        self.tokenizer = tokenizer
        self.abort = abort
        self._inbox: queue.SimpleQueue[tuple[_Listener, StepOutput] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="lmdeploy_jax output", daemon=True)
        self._thread.start()

    def listener(
        self, prompt: Sequence[int], options: OutputOptions, sink: Sink, flush: Flush | None = None
    ) -> Callable[[StepOutput], None]:
        """A request's `on_output`. Each answer reaches `sink` as pieces, the last with a finish_reason.

        A `flush` that several requests share is called once for all of their pieces that come together, so
        that their reader does not wake up, and contend for the interpreter, at the first of them.
        """
        return _Listener(self, prompt, options, sink, flush).receive

    def put(self, listener: _Listener, out: StepOutput) -> None:
        self._inbox.put((listener, out))

    def close(self) -> None:
        """Deliver what has been handed in, then stop."""
        self._inbox.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        going = True
        while going:
            outs: defaultdict[tuple[_Listener, int], MergedOutput] = defaultdict(MergedOutput)
            going = self._take(outs)
            for (listener, _), merged in outs.items():
                listener.process(merged.result())
            for flush in {listener.flush for listener, _ in outs}:
                self._flush(flush)

    def _flush(self, flush: Flush | None) -> None:
        try:
            if flush is not None:
                flush()
        except BaseException:  # as from a reader's sys.exit()
            logger.exception("a reader of answers failed")

    def _take(self, outs: defaultdict[tuple[_Listener, int], MergedOutput]) -> bool:
        """Everything that waits, by sequence; sleeps if nothing does. False once closed."""
        item = self._inbox.get()
        while item is not None:
            listener, out = item
            outs[listener, out.index].add(out)
            try:
                item = self._inbox.get_nowait()
            except queue.Empty:
                return True
        return False


class _Listener:
    """A request's answers, and where they are told."""

    def __init__(
        self,
        processor: OutputProcessor,
        prompt: Sequence[int],
        options: OutputOptions,
        sink: Sink,
        flush: Flush | None,
    ) -> None:
        self.flush = flush
        self._processor = processor
        self._sink = sink
        self._answers = [
            Answer(processor.tokenizer, prompt, options, choice) for choice in range(options.config.n)
        ]
        self._final_only = not options.stream
        # Where nobody reads along, tokens become text once, at the end.
        self._merge_all = self._final_only and not options.stops.strings
        self._waiting = [MergedOutput() for _ in self._answers]
        self._responses: list[Response | None] = [None for _ in self._answers]

    def receive(self, out: StepOutput) -> None:
        """Called on the engine's thread."""
        if self._merge_all:
            waiting = self._waiting[out.index]
            waiting.add(out)
            if out.finish_reason is None:
                return
            out = waiting.result()
        self._processor.put(self, out)

    def process(self, out: StepOutput) -> None:
        answer = self._answers[out.index]
        if answer.done:
            return
        try:
            piece = answer.feed(out)
        except BaseException as error:  # one answer's fault, a panic of Rust too, must not end the others
            logger.exception("answer %d of request %d failed", out.index, out.request_id)
            piece = answer.failed(error)
        if answer.done and out.finish_reason is None:
            self._processor.abort(out.request_id, out.index)
        self._tell(out, piece)

    def _tell(self, out: StepOutput, piece: Response) -> None:
        if self._final_only:
            before = self._responses[out.index]
            piece = self._responses[out.index] = piece if before is None else before.extend(piece)
            if piece.finish_reason is None:
                return
        try:
            self._sink(piece)
        except BaseException:
            logger.exception("the reader of request %d failed; it is aborted", out.request_id)
            self._answers[out.index].done = True
            self._processor.abort(out.request_id, out.index)
