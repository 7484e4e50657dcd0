// In the audio thread: 80 ms of the microphone at a time (silence where there is none), and what is to be heard, from two queues.
const FRAME = 1920, MOST = 24000; // samples: of a frame, and that may wait to be heard

class Capture extends AudioWorkletProcessor {
  constructor() { super(); this.frame = new Float32Array(FRAME); this.filled = 0; }
  process([input]) {
    const channel = input[0], count = channel ? channel.length : 128;
    for (let i = 0; i < count; i++) {
      this.frame[this.filled++] = channel ? channel[i] : 0;
      if (this.filled === FRAME) { this.port.postMessage(this.frame.slice()); this.filled = 0; }
    }
    return true;
  }
}

class Player extends AudioWorkletProcessor {
  constructor() {
    super();
    this.queues = { moshi: [], clip: [] };
    this.port.onmessage = ({ data: { queue, samples } }) => {
      const waiting = this.queues[queue];
      waiting.push(...samples);
      if (queue === "moshi" && waiting.length > MOST) waiting.splice(0, waiting.length - MOST / 4); // after a stall: be in time again
    };
  }
  process(_, [output]) {
    const channel = output[0];
    for (const waiting of Object.values(this.queues)) {
      const count = Math.min(channel.length, waiting.length);
      for (let i = 0; i < count; i++) channel[i] += waiting[i];
      if (count) waiting.splice(0, count);
    }
    return true;
  }
}
registerProcessor("capture", Capture);
registerProcessor("player", Player);
