// Sound of the browser: microphone and loudspeaker in frames of 80 ms at 24 kHz, and two codecs for the line.
import { OggReader, OggWriter } from "./ogg.js";

export const RATE = 24000, FRAME = 1920;

export class Sound {
  // onframe gets every 80 ms of the microphone, or silence.
  static async open(onframe) {
    const sound = new Sound();
    sound.context = new AudioContext({ sampleRate: RATE });
    await sound.context.audioWorklet.addModule("/static/worklet.js");
    await sound.context.resume();
    sound.capture = new AudioWorkletNode(sound.context, "capture");
    sound.player = new AudioWorkletNode(sound.context, "player", { outputChannelCount: [1] });
    sound.player.connect(sound.context.destination);
    const silent = new GainNode(sound.context, { gain: 0 }); // a node that leads nowhere is not run
    sound.capture.connect(silent).connect(sound.context.destination);
    sound.capture.port.onmessage = ({ data }) => onframe(data);
    return sound;
  }

  async microphone(headphones) {
    if (!navigator.mediaDevices) throw new DOMException("", "SecurityError");
    const audio = { channelCount: 1, echoCancellation: !headphones, noiseSuppression: !headphones, autoGainControl: true };
    this.stream = await navigator.mediaDevices.getUserMedia({ audio });
    this.context.createMediaStreamSource(this.stream).connect(this.capture);
  }

  play(queue, samples) { this.player.port.postMessage({ queue, samples }); }

  close() {
    this.stream?.getTracks().forEach((track) => track.stop());
    this.capture.port.onmessage = null;
    this.context.close();
  }
}

// Ogg Opus by WebCodecs.
export class OpusCodec {
  static available = "AudioEncoder" in window && "AudioDecoder" in window;
  format = "opus";

  constructor(send, play, fail) {
    const writer = new OggWriter(RATE);
    this.reader = new OggReader();
    this.at = this.heard = 0; // microseconds
    this.encoder = new AudioEncoder({
      output: (chunk) => {
        const packet = new Uint8Array(chunk.byteLength);
        chunk.copyTo(packet);
        send(writer.page(packet, Math.round((chunk.duration * 48) / 1000)));
      },
      error: fail,
    });
    this.encoder.configure({ codec: "opus", sampleRate: RATE, numberOfChannels: 1, bitrate: 32000, opus: { frameDuration: 20000 } });
    this.decoder = new AudioDecoder({ output: (data) => { play(this.#samples(data)); data.close(); }, error: fail });
    this.decoder.configure({ codec: "opus", sampleRate: RATE, numberOfChannels: 1 });
  }

  encode(frame) {
    const data = new AudioData({ format: "f32", sampleRate: RATE, numberOfFrames: frame.length, numberOfChannels: 1, timestamp: this.at, data: frame });
    this.at += (frame.length / RATE) * 1e6;
    this.encoder.encode(data);
    data.close();
  }

  decode(bytes) {
    for (const data of this.reader.packets(bytes)) this.decoder.decode(new EncodedAudioChunk({ type: "key", timestamp: (this.heard += 20000), data }));
  }

  #samples(data) {
    const samples = new Float32Array(data.numberOfFrames);
    data.copyTo(samples, { planeIndex: 0, format: "f32-planar" });
    if (data.sampleRate === RATE) return samples;
    return Float32Array.from({ length: samples.length >> 1 }, (_, i) => (samples[2 * i] + samples[2 * i + 1]) / 2); // from 48 kHz
  }

  close() { for (const codec of [this.encoder, this.decoder]) if (codec.state !== "closed") codec.close(); }
}

// Bare 16-bit samples, for browsers without WebCodecs.
export class PcmCodec {
  format = "pcm";
  constructor(send, play) { this.send = send; this.play = play; }
  encode(frame) { this.send(new Uint8Array(toInt16(frame).buffer)); }
  decode(bytes) { this.play(Float32Array.from(new Int16Array(bytes.slice().buffer), (x) => x / 32768)); }
  close() {}
}

export const toInt16 = (samples) => Int16Array.from(samples, (x) => Math.max(-1, Math.min(1, x)) * 32767);

// Loudness from 0 to 1, over 60 decibels.
export function level(samples) {
  const power = samples.reduce((sum, x) => sum + x * x, 0) / Math.max(samples.length, 1);
  return power ? Math.max(0, Math.min(1, 1 + Math.log10(power) / 6)) : 0;
}

// Both voices as a WAV file, Moshi left.
export function wav(moshi, you) {
  const [left, right] = [moshi, you].map((pieces) => pieces.flatMap((piece) => [...piece]));
  const count = Math.max(left.length, right.length), view = new DataView(new ArrayBuffer(44 + 4 * count));
  const text = (at, word) => [...word].forEach((c, i) => view.setUint8(at + i, c.charCodeAt(0)));
  text(0, "RIFF"); view.setUint32(4, 36 + 4 * count, true); text(8, "WAVEfmt "); view.setUint32(16, 16, true);
  view.setUint16(20, 1, true); view.setUint16(22, 2, true); view.setUint32(24, RATE, true); view.setUint32(28, 4 * RATE, true);
  view.setUint16(32, 4, true); view.setUint16(34, 16, true); text(36, "data"); view.setUint32(40, 4 * count, true);
  for (let i = 0; i < count; i++) {
    view.setInt16(44 + 4 * i, left[i] ?? 0, true);
    view.setInt16(46 + 4 * i, right[i] ?? 0, true);
  }
  return new Blob([view], { type: "audio/wav" });
}
