// Opus packets into Ogg pages and out of them (RFC 3533, RFC 7845), one packet a page on the way out.
const CRC = Uint32Array.from({ length: 256 }, (_, byte) => {
  let r = byte << 24;
  for (let i = 0; i < 8; i++) r = r & 0x80000000 ? (r << 1) ^ 0x04c11db7 : r << 1;
  return r >>> 0;
});

function crc(bytes) {
  let r = 0;
  for (const byte of bytes) r = ((r << 8) ^ CRC[(r >>> 24) ^ byte]) >>> 0;
  return r;
}

export class OggWriter {
  constructor(sampleRate) { this.serial = (Math.random() * 2 ** 32) >>> 0; this.number = 0; this.granule = 0; this.sampleRate = sampleRate; }

  // The page of a packet of so many samples at 48 kHz; the first carries both heads.
  page(packet, samples) {
    const heads = this.number === 0 ? [this.#page(this.#head(), 2), this.#page(this.#tags(), 0)] : [];
    this.granule += samples;
    return join([...heads, this.#page(packet, 0)]);
  }

  #page(packet, flags) {
    const segments = Math.floor(packet.length / 255) + 1, page = new Uint8Array(27 + segments + packet.length), view = new DataView(page.buffer);
    page.set([0x4f, 0x67, 0x67, 0x53, 0, flags]);
    view.setBigUint64(6, BigInt(this.granule), true);
    view.setUint32(14, this.serial, true);
    view.setUint32(18, this.number++, true);
    page[26] = segments;
    page.fill(255, 27, 27 + segments - 1);
    page[26 + segments] = packet.length % 255;
    page.set(packet, 27 + segments);
    view.setUint32(22, crc(page), true);
    return page;
  }

  #head() {
    const head = new Uint8Array(19), view = new DataView(head.buffer);
    head.set([...new TextEncoder().encode("OpusHead"), 1, 1]);
    view.setUint16(10, 312, true);
    view.setUint32(12, this.sampleRate, true);
    return head;
  }

  #tags() {
    const tags = new Uint8Array(20);
    tags.set(new TextEncoder().encode("OpusTags"));
    tags[8] = 4;
    tags.set(new TextEncoder().encode("page"), 12);
    return tags;
  }
}

export class OggReader {
  constructor() { this.rest = new Uint8Array(0); this.packet = []; this.heads = 2; }

  // The sound's packets that end in these bytes.
  packets(bytes) {
    let data = join([this.rest, bytes]);
    const found = [];
    while (data.length >= 27 && data.length >= 27 + data[26]) {
      const table = data.subarray(27, 27 + data[26]), size = table.reduce((sum, n) => sum + n, 0), start = 27 + table.length;
      if (data.length < start + size) break;
      let at = start;
      for (const length of table) {
        this.packet.push(data.slice(at, (at += length)));
        if (length < 255) {
          const whole = join(this.packet);
          this.packet = [];
          if (this.heads > 0) this.heads--;
          else found.push(whole);
        }
      }
      data = data.subarray(start + size);
    }
    this.rest = data.slice();
    return found;
  }
}

export function join(parts) {
  const whole = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) { whole.set(part, at); at += part.length; }
  return whole;
}
