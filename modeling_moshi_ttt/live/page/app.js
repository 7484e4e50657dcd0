// The page: one call at a time over Kyutai's protocol, what is said, and what the memory learns.
import { Losses } from "./losses.js";
import { join } from "./ogg.js";
import { FRAME, OpusCodec, PcmCodec, Sound, level, toInt16, wav } from "./sound.js";

const AUDIO = 1, TEXT = 2, CONTROL = 3, METADATA = 4, ERROR = 5, PING = 6, START = 0, PAUSE = 2, SAVE = 16;
const KEPT_FRAMES = 12.5 * 900; // of a recording: fifteen minutes
const LEAD = 12000; // samples of silence before a first clip: nobody speaks at once
const $ = (id) => document.getElementById(id);
const form = $("settings").querySelector("form"), address = new URLSearchParams(location.search);
const losses = new Losses($("losses"), $("layers"));
let call = null, info = {}, resumable = address.get("resume");
const recording = { moshi: [], you: [] };

const MICROPHONE = {
  NotAllowedError: "The browser does not give the microphone. Allow it in the address bar, or play the sounds below to it.",
  NotFoundError: "There is no microphone. Plug one in, or play the sounds below to it.",
  NotReadableError: "Another program holds the microphone. Close it there, and press Talk again.",
  SecurityError: "Browsers give their microphone to https and to this machine only. Open the page as https, or as http://127.0.0.1.",
};

class Call {
  async open(withMicrophone, resume) {
    this.begun = performance.now();
    this.clip = null;
    this.paused = false;
    this.sound = await Sound.open((frame) => this.hear(frame));
    if (withMicrophone) {
      try { await this.sound.microphone(form.elements.headphones.checked); }
      catch (error) { tellProblem(MICROPHONE[error.name] ?? `The microphone cannot be opened (${error.name}).`); }
    }
    const codec = OpusCodec.available ? OpusCodec : PcmCodec;
    this.codec = new codec((bytes) => this.send(AUDIO, bytes), (samples) => this.say(samples), (error) => this.close(`The browser's Opus failed: ${error.message}`));
    this.line = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/api/chat?${this.query(resume)}`);
    this.line.binaryType = "arraybuffer";
    this.line.onmessage = ({ data }) => this.take(new Uint8Array(data));
    this.line.onclose = ({ code }) => this.close(this.problem ?? (code === 1000 || this.over ? "" : `The server hung up (${code}). The conversation is kept: press Go on.`));
    this.pings = setInterval(() => this.ping(), 2000);
    this.clock = setInterval(() => showClock((performance.now() - this.begun) / 1000), 500);
  }

  query(resume) {
    const fields = { format: this.codec.format, stats: "1", token: form.elements.token.value };
    if (resume) fields.resume = resume;
    else for (const name of ["seed", "text_temperature", "audio_temperature", "text_prompt", "voice_prompt"]) fields[name] = form.elements[name].value;
    return new URLSearchParams(Object.entries(fields).filter(([, value]) => value !== ""));
  }

  send(kind, bytes = []) { if (this.line.readyState === WebSocket.OPEN) this.line.send(join([[kind], bytes])); }

  hear(frame) {
    if (!this.ready || this.paused) return;
    if (this.clip) {
      frame = this.clip.subarray(0, FRAME);
      this.clip = this.clip.length > FRAME ? this.clip.subarray(FRAME) : null;
      if (frame.length < FRAME) frame = Float32Array.from({ length: FRAME }, (_, i) => frame[i] ?? 0);
      this.sound.play("clip", frame);
      if (!this.clip) for (const button of $("clips").children) button.removeAttribute("aria-busy");
    }
    this.codec.encode(frame);
    showLevel("you", level(frame));
    keep("you", frame);
  }

  say(samples) {
    this.sound.play("moshi", samples);
    showLevel("moshi", level(samples));
    keep("moshi", samples);
  }

  take(message) {
    const kind = message[0], payload = message.subarray(1), text = () => new TextDecoder().decode(payload);
    if (kind === 0) this.start();
    else if (kind === AUDIO) this.codec.decode(payload);
    else if (kind === TEXT) write("moshi", text());
    else if (kind === METADATA) this.note(JSON.parse(text()));
    else if (kind === ERROR) this.problem = `The server says: ${text()}`;
    else if (kind === PING) this.there = performance.now() - this.pinged;
  }

  start() {
    this.ready = true;
    $("hint").hidden = true;
    for (const id of ["pause", "save", "download"]) $(id).disabled = false;
    tell("");
  }

  note(data) {
    if (data.type === "begin") resumable = data.conversation;
    else if (data.type === "saved") tellKept(data.minutes);
    else if (data.type === "stats") {
      losses.add(data.layers);
      $("factor").textContent = data.real_time_factor.toFixed(2);
      $("latency").textContent = `${Math.round(1000 * data.latency + (this.there ?? 0))} ms`;
    }
  }

  ping() { this.pinged = performance.now(); this.send(PING); }

  pause(paused) {
    this.paused = paused;
    this.send(CONTROL, [paused ? PAUSE : START]);
    $("pause").setAttribute("aria-pressed", paused);
    $("pause").textContent = paused ? "Go on" : "Pause";
    showLevel("you", 0);
    tell(paused ? "Paused: it hears nothing, and time stands still for it." : "");
  }

  close(problem) {
    if (this.over) return;
    this.over = true;
    for (const timer of [this.pings, this.clock]) clearInterval(timer);
    this.line.close();
    this.codec.close();
    this.sound.close();
    call = null;
    for (const who of ["you", "moshi"]) showLevel(who, 0);
    for (const id of ["pause", "save"]) $(id).disabled = true;
    $("pause").textContent = "Pause";
    showCall(false);
    $("resume").hidden = !this.ready;
    if (problem) tellProblem(problem);
    else if (this.ready) tell("You hung up. The conversation is kept: press Go on to take it up again.");
  }
}

async function begin(withMicrophone, resume = null) {
  tellProblem("");
  tell("Calling …");
  showCall(true);
  $("resume").hidden = true;
  if (!resume) { losses.clear(); $("transcript").replaceChildren(); recording.moshi = []; recording.you = []; }
  const opened = (call = new Call());
  try { await opened.open(withMicrophone, resume); }
  catch (error) { call = null; showCall(false); tell(""); tellProblem(`This browser cannot play and record sound as is needed (${error.message}). Try a newer one.`); }
}

async function playClip(button, { name, words }) {
  const answer = await fetch(`/api/clips/${name}.wav`);
  const samples = Float32Array.from(new Int16Array((await answer.arrayBuffer()).slice(44)), (x) => x / 32768);
  const begins = !call;
  if (begins) await begin(false);
  if (!call) return;
  if (call.paused) call.pause(false);
  for (const other of $("clips").children) other.removeAttribute("aria-busy");
  button.setAttribute("aria-busy", "true");
  call.clip = begins ? Float32Array.from({ length: LEAD + samples.length }, (_, i) => samples[i - LEAD] ?? 0) : samples;
  write("you", words);
}

let turn = null; // the line of the transcript that grows
function write(who, text) {
  const now = performance.now();
  if (!turn || turn.who !== who || who === "you" || now - turn.last > 4000) {
    const line = document.createElement("p"), when = document.createElement("small");
    when.textContent = `${who === "you" ? "you" : "Moshi"}, ${$("clock").textContent}`;
    line.className = who;
    line.append(when, document.createTextNode(""));
    $("transcript").append(line);
    turn = { who, line };
  }
  turn.last = now;
  turn.line.lastChild.textContent = (turn.line.lastChild.textContent + text).trimStart();
  $("transcript").scrollTop = $("transcript").scrollHeight;
}

function keep(side, samples) {
  recording[side].push(toInt16(samples));
  if (recording[side].length > KEPT_FRAMES) recording[side].shift();
}

function showCall(on) {
  $("call").setAttribute("aria-pressed", on);
  $("call-label").textContent = on ? "Hang up" : "Talk";
}

function showLevel(who, share) {
  $(`level-${who}`).style.setProperty("--level", share);
  $(`level-${who}`).setAttribute("aria-valuenow", share.toFixed(2));
}

function showClock(seconds) { $("clock").textContent = `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`; }
function tell(text) { $("notice").textContent = text; }
function tellProblem(text) { $("problem").textContent = text; $("problem").hidden = !text; if (text) tell(""); }

function tellKept(minutes) {
  const link = document.createElement("a"), place = new URL(location.href);
  place.search = new URLSearchParams({ ...(address.get("token") && { token: address.get("token") }), resume: resumable });
  link.href = link.textContent = place.href;
  $("notice").replaceChildren(`Saved for ${Math.round(minutes)} minutes. Go on from here, on any device: `, link);
}

function download() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(wav(recording.moshi, recording.you));
  link.download = "conversation.wav";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

async function show() {
  try { info = await (await fetch("/api/info")).json(); }
  catch { tellProblem("The server does not answer. Is it running? Load the page again."); return; }
  $("model").textContent = info.model;
  $("reach").textContent = `${info.reach_seconds.toFixed(1)} s`;
  $("kept").textContent = `When you hang up it is kept for ${Math.round(info.keep_minutes)} minutes, then removed.`;
  $("token-label").hidden = !info.token;
  form.elements.token.value = address.get("token") ?? "";
  for (const voice of info.voices) form.elements.voice_prompt.append(new Option(voice));
  if (info.clips.length) {
    $("clips").hidden = false;
    $("hint").textContent = `Its attention reaches ${info.reach_seconds.toFixed(1)} seconds back. Tell it a name, let more time pass, and ask: what it still knows then, its memory has learned. No microphone is needed; the sounds below are played to it.`;
    for (const clip of info.clips) {
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: clip.label, title: clip.words });
      button.onclick = () => playClip(button, clip);
      $("clips").append(button);
    }
  }
  if (!info.ttt_layers.length) $("layers").innerHTML = "<tr><td colspan=4>this model has no memory layers</td></tr>";
  $("resume").hidden = !resumable;
}

$("call").onclick = () => (call ? call.close("") : begin(true));
$("pause").onclick = () => call?.pause(!call.paused);
$("save").onclick = () => call?.send(CONTROL, [SAVE]);
$("resume").onclick = () => begin(true, resumable);
$("download").onclick = download;
$("open-settings").onclick = () => $("settings").showModal();
show();
