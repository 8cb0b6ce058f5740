// An answer as it comes: its message in the protocol's form, and what is told of it.

export class Answer {
  // message: an answer that goes on; without one a new answer begins.
  constructor(model, message = { role: "assistant", content: "" }) {
    this.message = { ...message, info: { model } };
    this.earlier = message.info?.thought;
    this.start = performance.now();
  }

  get phase() {
    if (this.first === undefined) return "reading";
    return this.thoughtUntil === undefined && this.message.reasoning_content ? "thinking" : "writing";
  }

  // Seconds that the model has thought.
  get thought() {
    if (this.earlier !== undefined || this.first === undefined || !this.message.reasoning_content) return this.earlier;
    return ((this.thoughtUntil ?? performance.now()) - this.first) / 1000;
  }

  take(event) {
    if (event.error) throw new Error(event.error.message);
    if (event.usage) this.message.info.usage = event.usage;
    for (const choice of event.choices ?? []) {
      if (choice.error) throw new Error(choice.error.message);
      if (choice.finish_reason) this.message.info.finish = choice.finish_reason;
      this.add(choice.delta);
    }
  }

  add({ reasoning_content: thought, content, tool_calls: calls = [] }) {
    if (!thought && !content && !calls.length) return;
    this.last = performance.now();
    this.first ??= this.last;
    if (thought) this.message.reasoning_content = (this.message.reasoning_content ?? "") + thought;
    else this.thoughtUntil ??= this.last;
    if (content) this.message.content += content;
    for (const call of calls) this.addCall(call);
  }

  addCall({ index, id, function: said }) {
    const calls = (this.message.tool_calls ??= []);
    const call = (calls[index] ??= { id, type: "function", function: { name: "", arguments: "" } });
    call.function.name += said?.name ?? "";
    call.function.arguments += said?.arguments ?? "";
  }

  // error: what ended the answer before its end, if anything did. Half a call cannot be answered.
  end(error) {
    const { info } = this.message;
    if (error?.name === "AbortError") info.stopped = true;
    else if (error) info.error = error.message;
    if (error) delete this.message.tool_calls;
    if (this.first === undefined) return;
    info.untilFirst = (this.first - this.start) / 1000;
    info.seconds = (this.last - this.first) / 1000;
    info.thought = this.thought;
  }

  get isEmpty() {
    return !this.message.content && !this.message.reasoning_content && !this.message.tool_calls?.length;
  }
}
